"""What `make check` asks of others is asked, and taken seriously."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from integration.upkeep import ROOT, broken, public_names, vulnerable

OLD = "def add(x, y, z=0):\n    return x + y\n\n\ndef gone():\n    pass\n"
NEW = "def add(x, z=0):\n    return x\n"


@pytest.fixture
def vulnerabilities() -> Iterator[str]:
    """A database that knows one fault of everything, mended in 9.9."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.9"}]}]
    affected = [{"package": {"name": "shop", "ecosystem": "PyPI"}, "ranges": ranges}]
    answer = json.dumps({"vulns": [{"id": "X-1", "modified": "2026-01-01T00:00:00Z", "affected": affected}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder where shop 1.0 is installed, and nothing else."""
    metadata = tmp_path / "shop-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    return tmp_path


def test_a_known_vulnerability_is_found(vulnerabilities: str, installed: Path) -> None:
    assert list(vulnerable("--osv-url", vulnerabilities, "--path", str(installed))) == ["shop 1.0: X-1, mended in 9.9"]


def test_who_cannot_ask_says_so(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(vulnerable("--osv-url", "http://127.0.0.1:9/", "--path", str(installed))) == []
    assert capsys.readouterr().out.startswith("pip-audit: not asked, for ")


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., None]:
    """`git …` in a repository of its own."""

    def run(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    run("init", "-q")
    return run


def test_a_public_name_that_changes_is_found_unless_the_changelog_tells_of_it(
    tmp_path: Path, git: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def found() -> list[str]:
        return sorted(line.partition(", since")[0] for line in broken(tmp_path, "shop", ["shop"]))

    (tmp_path / "shop.py").write_text(OLD)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("## [Unreleased]\n")
    git("add", ".")
    git("commit", "-qm", "first")
    assert found() == []
    assert "no tag yet" in capsys.readouterr().out

    git("tag", "v1")
    (tmp_path / "shop.py").write_text(NEW)
    add = ["shop.add: Parameter was removed", "shop.add: Positional parameter was moved"]
    gone = "shop.gone: Public object was removed"
    assert found() == [*add, gone]

    changes.write_text(
        "## [Unreleased]\n\n### Added\n\n- More than `gone`.\n\n## [1]\n\n### Changed\n\n- `add` is there.\n"
    )
    assert found() == [*add, gone]
    changes.write_text("## [Unreleased]\n\n### Removed\n\n- `gone` is gone.\n\n### Fixed\n\n- `add`.\n")
    assert found() == add


def test_a_method_of_ours_that_is_renamed_is_found(tmp_path: Path, git: Callable[..., None]) -> None:
    for name in ("amqtask/__init__.py", "amqtask/task.py", "docs/api.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1")
    tasks = tmp_path / "amqtask" / "task.py"
    tasks.write_text(tasks.read_text().replace("def apply_async(", "def apply_async_now("))

    (line,) = broken(tmp_path, "amqtask", public_names(tmp_path))
    assert line.startswith("amqtask.task.Task.apply_async: Public object was removed, since v1")
