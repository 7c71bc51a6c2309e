"""`amqtask console`: who may come is named by the command line or the environment; where it cannot be served."""

from __future__ import annotations

import base64
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from amqtask.__main__ import main
from amqtask.console.access import Access, Denied, hashed

pytestmark = pytest.mark.usefixtures("loggers")
APP = 'from amqtask import AmqTask\napp = AmqTask("seen", broker="amqp://127.0.0.1:1//")\n'


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the command would serve."""
    (tmp_path / "seen_by_users.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    applications: list[Any] = []

    def run(server: uvicorn.Server, sockets: object = None) -> None:
        server.started = True
        applications.append(server.config.app)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return applications


def test_the_user_of_the_environment_may_come_and_nobody_else(
    served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMQTASK_CONSOLE_USER", f"ann:{hashed('secret')}")

    assert main(["-A", "seen_by_users", "console", "--host", "0.0.0.0", "-p", "0"]) == 0
    client = TestClient(served[0])
    assert client.get("/audit").status_code == 401
    assert client.get("/audit", auth=("ann", "wrong")).status_code == 401
    assert client.get("/audit", auth=("ann", "secret")).status_code == 200


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_its_address_can_be_opened(
    host: str, shown: str, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip("this machine has no such address")

    assert main(["-A", "seen_by_users", "console", "--host", host, "-p", "0"]) == 0
    assert re.search(rf"The console is on http://{re.escape(shown)}:[1-9]\d+, for", capsys.readouterr().out)


def test_a_user_without_a_hash_is_refused(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-A", "seen_by_users", "console", "--user", "ann:secret"]) == 2
    assert "--user wants NAME:HASH" in capsys.readouterr().err
    assert served == []


def test_a_port_that_is_taken_is_told_before_the_console_is_said_to_be_there(
    served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["-A", "seen_by_users", "console", "-p", str(port)]) == 1

    shown = capsys.readouterr()
    assert f"cannot be served on 127.0.0.1:{port}: Address already in use" in shown.err
    assert "The console is on" not in shown.out
    assert served == []


def test_a_name_that_nobody_has_is_refused_no_sooner_than_a_wrong_password() -> None:
    access = Access({"ann": hashed("secret")})

    def seconds(login: str) -> float:
        began = time.process_time()
        with pytest.raises(Denied, match="log in"):
            access.user({"authorization": f"Basic {base64.b64encode(login.encode()).decode()}"})
        return time.process_time() - began

    known, unknown = (min(seconds(f"{name}:wrong") for _ in range(5)) for name in ("ann", "bob"))
    assert unknown > known / 3
