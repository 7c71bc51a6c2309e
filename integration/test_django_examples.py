"""The Django projects of the tutorials (examples/django_project, examples/luffy), run by the lines that the tutorials have."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import redis

from integration.chromium import Browser, chromium
from integration.conftest import Broker
from integration.nodes import NodeError, free_port
from integration.projects import Project
from integration.servers import Postgres
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
        for queue in ("amqtask", "amqtask.dead", "amqtask.beat.project_name.amqtask.django"):
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
        with urllib.request.urlopen(url, data, timeout=90) as answer:
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
    with project.start("python3 ./manage.py amqtask worker -l info -P gevent -c 2 -n asked@here"):
        task_id = project.run("python3 ./manage.py amqtask call notices.tasks.add --args [3,4]").split()[-1]
        assert project.run(f"python3 ./manage.py amqtask result {task_id} --wait 60").strip() == "7"
        assert "pong" in project.run("python3 ./manage.py amqtask inspect ping -d asked@here -t 60")


BEAT = "amqtask -A project_name beat --scheduler django_celery_beat.schedulers:DatabaseScheduler -l info"
LEADING = "beat: leading"
CHANGED = "beat: the schedule has changed"


class Results:
    """What tasks have returned, as the database has it."""

    def __init__(self, server: Postgres, database: str) -> None:
        self._server, self._database = server, database

    def _ask(self, statement: str) -> list[str]:
        return self._server.execute(statement, self._database).splitlines()

    def of(self, task: str) -> list[str]:
        """In the order of their ends."""
        return self._ask(f"SELECT result FROM amqtask_taskresult WHERE task_name = '{task}' ORDER BY date_done, id")

    @property
    def greeted(self) -> list[str]:
        return [json.loads(line).removeprefix("welcome, ") for line in self.of("notices.tasks.welcome") if line]

    def runs(self, name: str) -> int:
        """How often beat has sent a periodic task."""
        return int(self._ask(f"SELECT total_run_count FROM amqtask_periodictask WHERE name = '{name}'")[0])


@pytest.fixture
def results(postgres_server: Postgres, postgres: str) -> Results:
    return Results(postgres_server, postgres)


def test_periodic_tasks_of_the_settings_and_of_a_program(
    project: Project, results: Results, postgres_server: Postgres
) -> None:
    with project.start(BEAT, ready=LEADING), project.start("amqtask --app project_name worker -l info") as worker:
        project.run("python3 ./manage.py say_welcome Ada")
        eventually(lambda: results.greeted.count("Ada") >= 2, what="the task of say_welcome did not run")
        worker.await_log("hello")
        eventually(lambda: results.of("notices.tasks.add"))
        assert set(results.of("notices.tasks.add")) == {"20"}

        # The database closes all connections, as a restart does: beat and worker find new ones.
        name = project.environment["DATABASE_URL"].rpartition("/")[2]
        postgres_server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        project.run("python3 ./manage.py say_welcome Grace")
        eventually(lambda: results.greeted.count("Grace") >= 2, what="beat does not see changes any more")

        listed = project.run("amqtask -A project_name beat -S django --list")

    assert "hello every 10" in listed
    assert "30 7 * * 1" in listed
    assert "say welcome to Ada" in listed


class Admin:
    """A superuser who uses the admin in a browser."""

    def __init__(self, browser: Browser, site: str) -> None:
        self.browser = browser
        self._root = f"{site}/admin/"

    def open(self, path: str = "") -> Admin:
        self.browser.open(self._root + path)
        return self

    def fill(self, **fields: str) -> Admin:
        for name, value in fields.items():
            self.browser.enter(self.browser.find(f"[name={name}]"), value)
        return self

    def press(self, selector: str) -> str:
        """Press a button; what the next page says of it."""
        self.browser.follow(self.browser.find(selector))
        return " ".join(map(self.browser.text, self.browser.find_all(".messagelist, .errornote, .errorlist")))

    def save(self) -> str:
        return self.press("[name=_save]")

    def act(self, action: str) -> str:
        """An action on the first row of the list of periodic tasks."""
        self.open("amqtask/periodictask/?q=Chromium")
        self.browser.click(self.browser.find(".action-select"))
        self.fill(action=action)
        return self.press("[name=index]")

    def edit(self, **fields: str) -> str:
        """Change the first row of that list."""
        self.open("amqtask/periodictask/?q=Chromium")
        self.browser.follow(self.browser.find("#result_list tbody th a"))
        return self.fill(**fields).save()

    def shoot(self, name: str) -> Admin:
        self.browser.screenshot(name)
        return self

    @property
    def page(self) -> str:
        return self.browser.text(self.browser.find("#content"))


@pytest.fixture
def admin(project: Project) -> Iterator[Admin]:
    """Logged in."""
    project.environment["DJANGO_SUPERUSER_PASSWORD"] = "secret"
    project.run("python3 ./manage.py createsuperuser --noinput --username root --email root@example.org")
    server, site = served(project)
    try:
        with server, chromium() as browser:
            made = Admin(browser, site).open()
            made.fill(username="root", password="secret").press("[type=submit]")
            yield made
    except NodeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_the_admin_changes_what_is_sent_by_a_beat_that_runs(project: Project, results: Results, admin: Admin) -> None:
    def soon(condition: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        eventually(condition, what=f"{what} does not come")
        print(f"{what} took {time.monotonic() - began:.2f} s")

    # One process, so that tasks end in the order in which they were sent.
    worker = project.start("amqtask --app project_name worker -l info -c 1")
    with worker, project.start(BEAT, ready=LEADING) as beat:

        def sent() -> int:
            return beat.log.count("Sending due task by Chromium")

        # A periodic task that is created.
        assert "was added" in admin.open("amqtask/intervalschedule/add/").fill(every="1", period="Seconds").save()
        admin.open("amqtask/periodictask/add/").fill(name="by Chromium", task="notices.tasks.welcome", args="[1")
        said = admin.save()
        assert "Choose an interval" in said
        assert "This is no JSON" in said
        admin.shoot("periodic-task-errors")
        said = admin.fill(interval="every second", args='["Ada"]').shoot("periodic-task-form").save()
        assert "was added successfully" in said
        soon(lambda: "Ada" in results.greeted, "a new periodic task")

        # One that is changed: nothing is sent as it was.
        assert "was changed" in admin.edit(args='["Grace"]')
        soon(lambda: "Grace" in results.greeted, "a change")
        greeted = results.greeted
        assert "Ada" not in greeted[greeted.index("Grace") :]

        # Disabled, it stops; it runs when it is told to, and goes on when it is enabled.
        changes = beat.log.count(CHANGED)
        assert "1 periodic task is disabled" in admin.act("Disable selected periodic tasks")
        soon(lambda: beat.log.count(CHANGED) > changes, "disabling")
        before = sent()
        admin.edit(args='["Barbara"]')
        assert "1 periodic task was published" in admin.act("Run selected periodic tasks now")
        soon(lambda: "Barbara" in results.greeted, "run now")
        time.sleep(2.5)  # two runs, if it were still sent
        assert sent() == before, "a disabled task is still sent"
        assert "1 periodic task is enabled" in admin.act("Enable selected periodic tasks")
        soon(lambda: results.greeted.count("Barbara") >= 2, "enabling")
        admin.open("amqtask/periodictask/").shoot("periodic-tasks")

        # Its results.
        assert "notices.tasks.welcome" in admin.open("amqtask/taskresult/").page
        admin.shoot("results")
        admin.browser.follow(admin.browser.find("#result_list tbody th a"))
        admin.shoot("result")
        assert "SUCCESS" in admin.page
        assert "by Chromium" in admin.page

        # Sent three times at least, beside the one by hand; written back soon after each.
        eventually(lambda: results.runs("by Chromium") >= 3)
