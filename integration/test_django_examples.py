"""The Django projects of the tutorials (examples/django_project, examples/luffy), run by the lines that the tutorials have."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import redis

from integration.conftest import Broker
from integration.nodes import free_port
from integration.projects import Project
from integration.workers import ROOT, LoggedProcess, eventually

EXAMPLES = ROOT / "examples"


class Gateway:
    """An HTTP server that keeps what is posted to it: the text message provider, or the chat."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                gateway.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


@pytest.fixture
def clean(rabbit: Broker) -> Iterator[Callable[[], None]]:
    """The examples share the default queue, so it goes before and after each test."""

    def delete() -> None:
        for queue in ("amqtask", "amqtask.dead"):
            rabbit.channel().queue_delete(queue)

    delete()
    yield delete
    delete()


def served(project: Project) -> tuple[LoggedProcess, str]:
    """`manage.py runserver`, and the URL of its pages."""
    port = free_port()
    server = project.start(
        f"python3 ./manage.py runserver 127.0.0.1:{port} --noreload", ready="Starting development server"
    )
    return server, f"http://127.0.0.1:{port}"


def get(url: str, **form: str) -> tuple[int, Any]:
    """Status and JSON of a page; with a form it is posted."""
    data = urllib.parse.urlencode(form).encode() if form else None
    try:
        with urllib.request.urlopen(url, data, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_code_is_sent_to_a_new_user(broker_url: str, redis_url: str, gateway: Gateway, clean: Any) -> None:
    luffy = Project(
        EXAMPLES / "luffy", broker_url=broker_url, backend=redis_url, REDIS_URL=redis_url, SMS_GATEWAY=gateway.url
    )
    mobile = "13800000000"
    store = redis.Redis.from_url(redis_url)
    store.delete(f"sms_{mobile}", f"mobile_{mobile}")
    server, site = served(luffy)

    with server, luffy.start("amqtask -A mycelery.main worker --loglevel=info -P eventlet"):
        first = get(f"{site}/users/sms/{mobile}/")
        second = get(f"{site}/users/sms/{mobile}/")

    code = store.get(f"sms_{mobile}")
    assert first == (200, {"msg": "发送短信成功"})
    assert second == (400, {"msg": "60秒内已经发送过短信了"})
    assert isinstance(code, bytes)
    assert gateway.posted == [{"to": mobile, "datas": [code.decode(), 5], "templateId": 1}]
    store.close()


@pytest.fixture
def project(broker_url: str, postgres: str, gateway: Gateway, clean: Any) -> Project:
    """The project of the second tutorial, on an empty PostgreSQL."""
    made = Project(
        EXAMPLES / "django_project",
        broker_url=broker_url,
        backend="django-db",
        DATABASE_URL=postgres,
        DINGTALK_WEBHOOK=gateway.url,
    )
    made.run("python3 ./manage.py migrate")
    return made


def test_a_view_calls_a_task(project: Project, gateway: Gateway) -> None:
    server, site = served(project)

    with server, project.start("amqtask --app project_name worker -l info") as worker:
        status, answer = get(f"{site}/notify/", message="你好")
        eventually(lambda: get(f"{site}/results/{answer['task']}/")[1] == {"state": "SUCCESS"})

        assert status == 202
        assert gateway.posted == [{"msgtype": "text", "text": {"content": "你好"}}]
        assert "project_name.celery.debug_task" in worker.log, "the banner lists the project's tasks"


def test_the_whole_command_line_by_manage_py(project: Project) -> None:
    with project.start("python3 ./manage.py amqtask worker -l info -P gevent -c 2"):
        task_id = project.run("python3 ./manage.py amqtask call notices.tasks.add --args [3,4]").split()[-1]
        assert project.run(f"python3 ./manage.py amqtask result {task_id}").strip() == "7"
        assert "pong" in project.run("python3 ./manage.py amqtask inspect ping")
