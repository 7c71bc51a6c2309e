"""The code of the documentation runs, and prints what it says that it prints.

The Python blocks of a page run in their order, as one program, with a worker of the page's application beside them as soon as
there is one. `print(…)  # 8` says what is printed. A block that is marked as a fragment (```python fragment) is none that
can run: it lacks a server, or the rest of a program.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

from amqtask import AmqTask
from amqtask.testing.worker import start_worker

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)
# `# shop/tasks.py` as a block's first line names the module that it is.
FILE = re.compile(r"# ([\w/]+)\.py\b")
# The tutorial's programs run in processes of their own, as it says: integration/test_pages.py.
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "tutorial.md" and BLOCK.search(path.read_text())
]

APPLICATION = """
from amqtask import AmqTask
app = AmqTask("shop", broker="memory://", backend="cache+memory://")
"""
ADD = f"{APPLICATION}\nadd = app.task(name='shop.add')(lambda x, y: x + y)\n"
# What the reader has already where a page begins: (module, code).
BEFORE: dict[str, tuple[str, str]] = {
    "async.md": ("shop.tasks", f"{APPLICATION}\nconfirm_order = app.task(name='c')(lambda order: order)\n"),
    "coming-from-celery.md": ("shop", ADD),
    "metrics.md": ("shop", APPLICATION),
    "outbox.md": ("shop.tasks", APPLICATION),
    "routing.md": (
        "shop",
        f"{APPLICATION}\nfrom amqtask import Queue\napp.conf.task_queues = [Queue('images')]\n"
        "resize = app.task(name='first')(lambda path: None)\n",
    ),
    "testing.md": ("tasks", ADD),
    "workflows.md": (
        "shop",
        f"{ADD}\nfetch, count, describe, total = (app.task(name=n)(lambda *args: 1) for n in 'abcd')\n"
        "pages, texts, pairs = ['a', 'b'], ['c', 'd'], [(1, 2), (3, 4)]\ncomposition = add.s(1, 2) | count.s()\n",
    ),
}
# Further blocks of these pages go on in the module of the first.
AFTER = {
    # A worker that starts without a fair task consumes no shards.
    "flow-control.md": "app.task(name='fair', fair_by='tenant')(lambda tenant: tenant)\n",
    "schedules.md": "look = app.task(name='look')(print)\nreport = app.task(name='report')(print)\n",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages name a RabbitMQ; here the broker is in memory."""
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")


class Page:
    """A page's blocks, as modules that import each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: dict[str, types.ModuleType] = {}
        self._module = ""
        if path.name in BEFORE:
            self._module, code = BEFORE[path.name]
            self._run(code, "what is there before")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.modules:
            sys.modules.pop(name, None)

    @property
    def app(self) -> AmqTask | None:
        """The application that its modules have made."""
        apps = [value for module in self.modules.values() for value in vars(module).values()]
        return next((app for app in apps if isinstance(app, AmqTask)), None)

    def run(self, number: int, code: str) -> None:
        """Run a block, and look at what it prints."""
        file = FILE.match(code)
        if file is not None:
            self._module = file[1].replace("/", ".").removesuffix(".__init__")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self._run(code, f"block {number}")
        assert printed.getvalue().splitlines() == PRINTS.findall(code), f"block {number} of {self.path.name}"
        if number == 1 and self.path.name in AFTER:
            self._run(AFTER[self.path.name], "after the first block")

    def _run(self, code: str, what: str) -> None:
        name = self._module or "shop"
        for parent in (name.partition(".")[0], name):
            if parent not in self.modules:
                self.modules[parent] = sys.modules[parent] = types.ModuleType(parent)
                self.modules[parent].__path__ = []
        exec(compile(code, f"{self.path.name}, {what}", "exec"), self.modules[name].__dict__)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_code_of_a_page_runs(path: Path) -> None:
    codes = [match[1] for match in BLOCK.finditer(path.read_text())]
    with Page(path) as page, contextlib.ExitStack() as stack:
        for number, code in enumerate(codes, start=1):
            page.run(number, code)
            app = page.app
            if number == 1 and app is not None and any(PRINTS.search(later) for later in codes[1:]):
                stack.callback(app.close)
                stack.enter_context(start_worker(app, pool="threads", concurrency=2))
