"""Where the command line finds the application, and what it says when it does not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask import AmqTask, current_app
from amqtask.cli.base import Globals
from amqtask.cli.daemon import expand, node_name
from amqtask.cli.find_app import find_app
from amqtask.cli.main import run
from amqtask.exceptions import AppNotFound
from amqtask.ground.current import replaced

APP = "from amqtask import AmqTask\n{name} = AmqTask('{main}', set_as_current=False)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project folder; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMQTASK_APP", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("tasks", "proj", "amqtask_app", "elsewhere"):
            del sys.modules[name]


def write(path: Path, *, name: str = "app", main: str = "found") -> None:
    """A module with an application."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(APP.format(name=name, main=main))


def test_a_module_and_attribute(folder: Path) -> None:
    write(folder / "elsewhere.py", name="queue_app")

    assert find_app("elsewhere:queue_app", folder).main == "found"
    assert find_app("elsewhere", folder).main == "found"
    assert find_app("elsewhere.queue_app", folder).main == "found"


@pytest.mark.parametrize("name", ["elsewhere:make", "elsewhere:make()"])
def test_a_function_that_makes_the_application(folder: Path, name: str) -> None:
    write(folder / "elsewhere.py", name="_app", main="made")
    with (folder / "elsewhere.py").open("a") as file:
        file.write("app = None\ndef make(): return _app\ndef nothing(): return None\n")

    assert find_app(name, folder).main == "made"
    with pytest.raises(AppNotFound, match="elsewhere:nothing makes nothing"):
        find_app("elsewhere:nothing", folder)


def test_the_app_that_a_command_runs_is_the_current_one(folder: Path) -> None:
    (folder / "elsewhere.py").write_text(
        "from amqtask import AmqTask\nmine, other = AmqTask('mine'), AmqTask('other')\n"
    )
    with replaced(AmqTask("before", set_as_current=False)):
        loaded = Globals(app="elsewhere:mine").load()

        assert (loaded.main, current_app.main) == ("mine", "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("elsewhere:add", "-A: elsewhere:add is the task elsewhere.add, not an AmqTask application."),
        ("elsewhere.add", "-A: elsewhere:add is the task elsewhere.add, not an AmqTask application."),
        ("elsewhere:make", "-A: elsewhere:make is called to make the application, and cannot be without arguments"),
    ],
)
def test_a_task_and_a_function_that_wants_arguments_are_no_application(folder: Path, name: str, said: str) -> None:
    (folder / "elsewhere.py").write_text(
        APP.format(name="app", main="x") + "@app.task\ndef add(x, y): ...\ndef make(config): ...\n"
    )

    with pytest.raises(AppNotFound, match=f"^{re.escape(said)}"):
        find_app(name, folder)


def test_an_error_of_ours_is_said_with_the_line_of_the_module_that_raised_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "elsewhere.py").write_text("from amqtask import exceptions\nraise exceptions.TimeoutError('no result')\n")

    assert run(["-A", "elsewhere", "report"]) == 1

    said = capsys.readouterr().err
    assert said.startswith(f"amqtask: no result\n  {folder / 'elsewhere.py'}, line 2: raise exceptions.TimeoutError(")


@pytest.mark.parametrize("line", ["list tasks -A elsewhere", "list -A elsewhere tasks", "report --app=elsewhere"])
def test_the_application_may_be_named_after_every_command(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (folder / "elsewhere.py").write_text("from amqtask import AmqTask\napp = AmqTask('found', broker='memory://')\n")

    assert run(line.split()) == 0, capsys.readouterr().err


def test_a_package_with_a_celery_module(folder: Path) -> None:
    write(folder / "proj" / "celery.py")
    (folder / "proj" / "__init__.py").write_text("")

    assert find_app("proj", folder).main == "found"


def test_the_environment_and_pyproject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "elsewhere.py")
    (folder / "pyproject.toml").write_text('[tool.amqtask]\napp = "elsewhere:app"\n')
    assert find_app(None, folder).main == "found"

    monkeypatch.setenv("AMQTASK_APP", "nowhere")
    with pytest.raises(AppNotFound, match="AMQTASK_APP says 'nowhere'"):
        find_app(None, folder)


def test_the_usual_places(folder: Path) -> None:
    write(folder / "tasks.py", main="usual")

    assert find_app(None, folder).main == "usual"


def test_nothing_found_says_what_was_looked_for(folder: Path) -> None:
    with pytest.raises(AppNotFound, match=r"tasks\.py.*amqtask_app\.py"):
        find_app(None, folder)


def test_an_error_inside_the_module_is_shown_as_it_is(folder: Path) -> None:
    (folder / "elsewhere.py").write_text("import not_installed_anywhere\n")

    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find_app("elsewhere", folder)


def test_something_that_is_no_app_is_named(folder: Path) -> None:
    (folder / "elsewhere.py").write_text("app = 5\n")

    with pytest.raises(AppNotFound, match="int"):
        find_app("elsewhere:app", folder)


def test_node_names_and_their_fields() -> None:
    assert node_name("w1@box") == "w1@box"
    assert node_name(None).startswith("celery@")
    assert expand("%n-%d-%h-%%.log", "w1@box.example.org") == "w1-example.org-box.example.org-%.log"


@pytest.mark.parametrize(
    "told",
    [
        "./tasks",
        "tasks.py",
        "./tasks.py",
        ".tasks",
        "../x/tasks.py",
        "sub/tasks:app",
        "/tasks",
        "tasks.",
        ".",
        "..",
        "./",
        "/",
        ":",
        ":app",
    ],
)
def test_a_file_where_a_module_is_wanted_is_told_with_the_module_s_name(folder: Path, told: str) -> None:
    write(folder / "tasks.py")

    with pytest.raises(AppNotFound, match=r"wants a module, as `import` does: .*tasks$") as caught:
        find_app(told, folder)
    assert ".py" not in str(caught.value).rpartition(":")[2]


@pytest.mark.parametrize("told", ["tasks.app.delay", "tasks.app.delay:x", "nothing.app", "tasks:app:x"])
def test_what_is_not_in_a_module_is_told(folder: Path, told: str) -> None:
    write(folder / "tasks.py")

    with pytest.raises(AppNotFound, match=r"there is no module|has no attribute"):
        find_app(told, folder)


def test_a_file_with_the_name_of_this_package_is_told(folder: Path) -> None:
    write(folder / "amqtask.py")

    with pytest.raises(AppNotFound, match=r"which is this package.*give it another name"):
        find_app("amqtask", folder)
    with pytest.raises(AppNotFound, match="give it another name"):
        find_app(None, folder)
