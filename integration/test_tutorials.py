"""Every program and command line of the five tutorials on Redis, as printed: URLs, names, ports. Only the import changes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration import flower_peer
from integration.machine import NodeError
from integration.printed import OwnNetwork, PrintedProject, Tutorial
from integration.waiting import eventually
from integration.workers import ROOT, LoggedProcess

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
EXAMPLES = ROOT / "examples"
Make = Callable[..., PrintedProject]


def _network(password: str = "") -> Iterator[OwnNetwork]:
    made = OwnNetwork(password)
    try:
        yield made.start()
    except NodeError as error:
        pytest.skip(f"a network of its own is not to be had: {error}")
    finally:
        made.remove()


@pytest.fixture(scope="module")
def network() -> Iterator[OwnNetwork]:
    """With a Redis that has no password."""
    yield from _network()


@pytest.fixture(scope="module")
def locked_network() -> Iterator[OwnNetwork]:
    """With a Redis that has tutorial 5's password."""
    yield from _network("123456")


@pytest.fixture
def project(network: OwnNetwork, tmp_path: Path) -> PrintedProject:
    """An empty folder, and an empty Redis."""
    network.ask("FLUSHALL")
    return PrintedProject(tmp_path, network)


def tutorial(number: int) -> Tutorial:
    """Its text; without it there is nothing to run."""
    try:
        return Tutorial(number)
    except NodeError as error:
        pytest.skip(str(error))


def copied(project: PrintedProject, name: str) -> PrintedProject:
    """An example of ours in the project's folder, for the files that a tutorial leaves to its reader."""
    shutil.copytree(EXAMPLES / name, project.folder, dirs_exist_ok=True)
    return project


# -- tutorial 1: a package beside a Django project


LUFFY = "celery -A mycelery.main worker --loglevel=info"


def luffy(project: PrintedProject) -> Tutorial:
    """The package `mycelery`."""
    text = tutorial(1)
    project.write(
        {
            "mycelery/__init__.py": "",
            "mycelery/main.py": text.program('Celery("luffy")', '"mycelery.cache"'),
            "mycelery/config.py": text.program("broker_url =", "result_backend ="),
            "mycelery/sms/tasks.py": text.program("def send_sms2()"),
            "runtask.py": text.program("send_sms.delay()", "右键运行"),
        }
    )
    return text


@pytest.mark.parametrize("pool", ["", " -P eventlet"])
def test_1_a_package_with_a_config_file(project: PrintedProject, pool: str) -> None:
    text = luffy(project)

    # The folder `cache`, which main.py names, is not there.
    with project.start(text.line(LUFFY) + pool) as worker:
        assert project.run("python runtask.py") == ""
        worker.await_log("发送短信!!!")
        assert worker.stop() == 0
        log = worker.log

    for words in (r"broker +redis://127.0.0.1:6379/14", r"results +redis://127.0.0.1:6379/15", "send_sms2"):
        assert re.search(words, log), words
    assert "autodiscover_tasks names 'mycelery.cache', and there is no such package" in log


def test_1_results_are_read_in_two_ways(project: PrintedProject) -> None:
    text = luffy(project)
    both = {"after": "方式1：", "until": "方式2"}, {"after": "方式2"}
    first, second = (text.program("方式1", "方式2", **part) for part in both)
    main = text.program("import django", 'Celery("luffy")')
    loads = 'app.autodiscover_tasks(["mycelery.sms","mycelery.mail"])'
    assert loads in main
    named = 'app.autodiscover_tasks(["mycelery.sms","mycelery.cache"])'
    before = (project.folder / "mycelery" / "main.py").read_text()
    project.write(
        {
            "mycelery/main.py": before.replace(named, loads),
            "mycelery/mail/tasks.py": "from mycelery.main import app\n\n\n@app.task\ndef send_email():\n    pass\n",
            "first.py": first,
            "second.py": second,
        }
    )

    with project.start(text.line(LUFFY)):
        printed = project.run("python first.py")
        again = project.run("python second.py")

    assert re.fullmatch(
        rf"({UUID}) <class 'amqtask\.result\.AsyncResult'>\n(True|False)\n\1\n(True|False)\nNone\n", printed
    )
    assert re.fullmatch(r"(True|False)\nNone\n", again)


VIEW = """
import random

from django_redis import get_redis_connection
from luffyapi.settings import constants
from rest_framework import status
from rest_framework.response import Response
from rest_framework.views import APIView

"""


def test_1_a_django_view_sends_a_code(project: PrintedProject) -> None:
    text = luffy(copied(project, "luffy"))
    project.write(
        {
            "mycelery/main.py": text.program("import django", 'Celery("luffy")'),
            "mycelery/sms/tasks.py": text.program("CCP()", "def send_sms(mobile, sms_code)"),
            "users/views.py": VIEW + text.program("class SMSAPIView"),
        }
    )
    page = "http://127.0.0.1:8000/users/sms/13800000000/"

    with (
        project.start(text.line("celery -A mycelery.main worker --loglevel=info -P eventlet")) as worker,
        project.start("python manage.py runserver --noreload", ready="Starting development server") as server,
    ):
        assert project.http(page) == '200 {"msg":"发送短信成功"}'
        assert project.http(page) == '400 {"msg":"60秒内已经发送过短信了"}'
        worker.await_log("to 13800000000")
        server.await_log("ret>>> None")


# -- tutorial 2: a first task, Flower, a Django project


def demo(project: PrintedProject) -> Tutorial:
    """`tasks.py` and `run_task.py`."""
    text = tutorial(2)
    tasks = text.program("Celery('tasks', broker='redis://127.0.0.1', backend='redis://127.0.0.1')")
    project.write({"tasks.py": tasks, "run_task.py": text.program("Is Task ready", "result.get(timeout=1)")})
    return text


def test_2_a_first_task(project: PrintedProject) -> None:
    text = demo(project)

    with project.start(text.line("celery -A tasks worker --loglevel=info")) as worker:
        printed = project.run(text.line("python3 ./run_task.py"))
        assert worker.stop() == 0

    assert printed in ("Is Task ready: False\ntask result: 8\n", "Is Task ready: True\ntask result: 8\n")


def flower(project: PrintedProject, line: str) -> LoggedProcess:
    """`amqtask … flower`, where Flower is installed."""
    project.environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'pools'}", "FLOWER_UNAUTHENTICATED_API": "true"}
    python = flower_peer.python()
    return project.start(line.replace("amqtask", f"{python} -W ignore -m amqtask", 1), ready="Visit me at")


@pytest.mark.parametrize("line", ["celery -A tasks flower --broker=redis://localhost:6379/0", "celery -A tasks flower"])
def test_2_flower_shows_the_worker_and_its_tasks(project: PrintedProject, line: str) -> None:
    text = demo(project)
    shown = text if "--broker" in line else tutorial(3)

    def is_shown() -> bool:
        project.run("python3 ./run_task.py")
        tasks = project.http("http://localhost:5555/api/tasks")
        return '"SUCCESS"' in tasks and '"tasks.add"' in tasks

    worker = project.start(text.line("celery -A tasks worker --loglevel=info") + " -E -n first@here")
    with worker, flower(project, shown.line(line)) as server:
        eventually(is_shown, every=0.5, what=lambda: server.log)
        assert "first@here" in project.http("http://localhost:5555/workers")


def django(project: PrintedProject) -> Tutorial:
    """`project_name` with its application `notices`, and a database."""
    text = tutorial(2)
    copied(project, "django_project")
    settings = project.folder / "project_name" / "settings.py"
    ours = "".join(line for line in settings.read_text().splitlines(True) if not line.startswith("CELERY"))
    celery = text.program("Celery('project_name')")
    shutil.rmtree(project.folder / "notices" / "management")
    project.write(
        {
            "project_name/settings.py": ours + text.program("redis://redis:6379/0", "redis://redis:6379/1"),
            "project_name/__init__.py": text.program("from .celery import app as celery_app"),
            "project_name/celery.py": celery,
            "notices/tasks.py": text.program("@shared_task", "send_dingtalk_message"),
        }
    )
    text.line("python3 ./manage.py migrate")
    project.run("python3 ./manage.py migrate")
    return text


def test_2_a_django_view_calls_a_shared_task(project: PrintedProject) -> None:
    text = django(project)

    with (
        project.start(
            text.line("celery --app ${project_name} worker -l info").replace("${project_name}", "project_name")
        ),
        project.start(
            text.line("python3 ./manage.py runserver 0.0.0.0:8000") + " --noreload",
            ready="Starting development server",
        ),
    ):
        status, _, answer = project.http("http://127.0.0.1:8000/notify/", "message=hello").partition(" ")
        assert status == "202"
        (task_id,) = re.findall(UUID, answer)
        page = f"http://127.0.0.1:8000/results/{task_id}/"
        eventually(lambda: project.http(page) == '200 {"state": "SUCCESS"}', every=0.2)


PERIODIC = "celery -A ${project_name} beat --scheduler django_celery_beat.schedulers:DatabaseScheduler"


def test_2_periodic_tasks_by_program_by_setting_and_at_run_time(project: PrintedProject) -> None:
    text = django(project)
    main = project.folder / "project_name" / "celery.py"
    schedule = text.program("app.conf.beat_schedule", "app_name.tasks.function_name")
    registered = text.program("from celery.schedules import crontab", "on_after_configure")
    main.write_text(
        main.read_text() + registered + schedule.replace("app_name.tasks.function_name", "notices.tasks.add")
    )
    with (project.folder / "notices" / "tasks.py").open("a") as tasks:
        tasks.write("\n\n@shared_task\ndef add(x, y):\n    return x + y\n")
    added = text.program("PeriodicTask.objects.create", "say welcome")
    project.write({"say_welcome.py": "import json\ndata = ['welcome']\n" + added})

    worker = project.start("amqtask --app project_name worker -l info -c 1")
    beat = text.line(PERIODIC).replace("${project_name}", "project_name")
    with worker, project.start(f"{beat} -l info", ready="beat: leading") as sender:
        # Its task is the tutorial's placeholder, which no worker knows.
        project.run("python3 ./manage.py shell -c \"exec(open('say_welcome.py').read())\"")
        sender.await_log("Sending due task say welcome")
        worker.await_log("hello")
        worker.await_log("world")
        worker.await_log("succeeded in ")
        worker.await_log("project_name.celery.function")
        listed = project.run("amqtask -A project_name beat -S django --list")

    for name in ("hello every 10", "add-every-10-seconds", "say welcome", "30 7 * * 1"):
        assert name in listed


# -- tutorial 3: a package with imports, pools, the long line


def test_3_a_package_with_imports_on_a_host_of_its_own(project: PrintedProject) -> None:
    text = tutorial(3)
    package = text.program("Celery('wedo')", "redis://10.8.238.2:6379/0", until="# 配置config")
    config = text.program("Celery('wedo')", after="# 配置config")
    tasks = "from wedo import app\n\n\n@app.task\ndef to_string(text):\n    return f'this is {text}'\n"
    period = (
        "from wedo import app\nfrom wedo.tasks import to_string\n\n\n@app.on_after_configure.connect\n"
        "def setup_periodic_tasks(sender, **kwargs):\n"
        "    sender.add_periodic_task(1.0, to_string.s('a period'), name='to_string')\n"
    )
    project.write(
        {
            "wedo/__init__.py": package,
            "wedo/config.py": config,
            "wedo/tasks.py": tasks,
            "wedo/period_task.py": period,
        }
    )

    line = text.line("celery -A 任务名称 worker --loglevel=INFO").replace("任务名称", "wedo")
    with project.start(line) as worker, project.start("amqtask -A wedo beat -l info", ready="beat: leading"):
        worker.await_log("this is a period")
        four = text.line("celery -A 任务名称 worker --loglevel=info --concurrency=4").replace("任务名称", "wedo")
        with project.start(f"{four} -n second@%h") as second:
            second.await_log("this is a period")
            assert re.search(r"concurrency +4 \(prefork\)", second.log)
        assert "redis://10.8.238.2:6379/0" in worker.log


@pytest.mark.parametrize("pool", ["eventlet", "gevent", "threads", "solo"])
def test_3_each_pool(project: PrintedProject, pool: str) -> None:
    demo(project)

    with project.start(tutorial(3).line(f"celery -A tasks worker -l info -P {pool}")) as worker:
        project.run("python3 ./run_task.py")
        assert worker.stop() == 0
        assert "succeeded in" in worker.log


LONG_LINE = (
    "celery worker --without-gossip --without-mingle --heartbeat-interval 60 -A tasks.cma.task -c 5 -E -Q cma_queue "
    "-l info -n cma.%%h -Ofair"
)
ROLLBACK = """
from amqtask import Celery, Task

app = Celery("cma", broker="redis://10.8.238.2:6379/0", backend="redis://10.8.238.2:6379/0")
app.conf.task_default_queue = "cma_queue"


class RollbackTask(Task):
    def on_success(self, result, task_id, args, kwargs):
        print("kept")


"""


def test_3_the_long_line_and_a_task_with_a_base_class(project: PrintedProject) -> None:
    text = tutorial(3)
    project.write(
        {
            "tasks/__init__.py": "",
            "tasks/cma/__init__.py": "",
            "tasks/cma/task.py": ROLLBACK + text.program("base=RollbackTask", "def my_task", until="# 解释"),
            "call.py": "from tasks.cma.task import my_task\n\nprint(my_task.delay(1, 2).id)\n",
        }
    )

    with project.start(text.line(LONG_LINE)) as worker:
        task_id = project.run("python call.py").strip()
        worker.await_log(f"Task tasks.cma.task.my_task[{task_id}] succeeded")
        worker.await_log("kept")
        assert worker.stop() == 0


# -- tutorial 4: a schedule, and a Flask project


def test_4_one_file(project: PrintedProject) -> None:
    text = tutorial(4)
    project.write({"tasks.py": text.program('broker = "redis://localhost:6379/0"')})

    with project.start(text.line("celery -A tasks worker")) as worker:
        added = "from tasks import add; print(add.delay(2, 3).get(timeout=60))"
        assert project.run(f'python -c "{added}"') == "5\n"
        assert worker.stop() == 0


def proj(project: PrintedProject, config: str) -> Tutorial:
    """The package `proj`."""
    text = tutorial(4)
    project.write(
        {
            "proj/__init__.py": "",
            "proj/celery.py": text.program('Celery("proj", include=["proj.tasks"])'),
            "proj/config.py": config,
            "proj/tasks.py": text.program("from proj.celery import app"),
        }
    )
    return text


def test_4_a_package(project: PrintedProject) -> None:
    (found,) = (block for block in tutorial(4).programs("CELERY_BACKEND_URL") if "SCHEDULE" not in block)
    text = proj(project, found)

    with project.start(text.line("celery -A proj worker -l info")) as worker:
        added = "from proj.tasks import add; print(add.delay(2, 3).get(timeout=60))"
        assert project.run(f'python -c "{added}"') == "5\n"
        assert "redis://localhost:6379/1" in worker.log
        assert worker.stop() == 0


def test_4_a_schedule_within_the_worker(project: PrintedProject) -> None:
    text = proj(project, tutorial(4).program("CELERYBEAT_SCHEDULE", "timedelta(seconds=30)"))

    with project.start(text.line("celery -A proj worker -B -l info")) as worker:
        worker.await_log("Task proj.tasks.add[")
        worker.await_log(": 32")
        assert worker.stop() == 0


def test_4_a_flask_project(project: PrintedProject, tmp_path: Path) -> None:
    broker = tutorial(4).program('CELERY_BROKER_URL = "redis://localhost:6379/0"')
    copied(project, "tutorials/wallet")
    config = project.folder / "wallet" / "config.py"
    source = re.sub(r"^CELERY_BROKER_URL = .*\n", broker, config.read_text(), flags=re.MULTILINE)
    assert broker in source
    config.write_text(source)
    project.environment["WALLET_DATABASE"] = str(tmp_path / "wallet.sqlite3")
    web = "http://127.0.0.1:5000"

    with (
        project.start("python chain.py 8545", ready="node at"),
        project.start("flask --app wallet amqtask worker -B -l info"),
        project.start("flask --app wallet run", ready="Running on"),
    ):
        mined = '[{"to": "alice", "amount": 5}]'
        assert project.http("http://127.0.0.1:8545/transfers", mined).startswith("200")
        eventually(lambda: '"amount":5' in project.http(f"{web}/balances/alice"), every=0.2)
        status, _, answer = project.http(f"{web}/sync", "now=1").partition(" ")
        (task_id,) = re.findall(UUID, answer)
        assert status == "202"
        assert project.run(f"flask --app wallet amqtask result {task_id} --wait 60").strip() == "0"


# -- tutorial 5: a Redis with a password, results by their ids


@pytest.fixture
def celerytest(locked_network: OwnNetwork, tmp_path: Path) -> PrintedProject:
    """Its programs; `result.py` is told its id by the reader."""
    text = tutorial(5)
    locked_network.ask("FLUSHALL")
    project = PrintedProject(tmp_path, locked_network)
    project.write(
        {
            "celery_app_task.py": text.program("redis://:123456@127.0.0.1:6379/2", "celery.Celery('test'"),
            "add_task.py": text.program("add.delay(4,5)"),
            "run.py": text.program("cel.worker_main()"),
            "result.py": text.program("AsyncResult(id=", "'PENDING'"),
        }
    )
    return project


WAYS = [
    "python run.py",
    "celery worker -A celery_app_task -l info",
    "celery worker -A celery_app_task -l info -P eventlet",
]


@pytest.mark.parametrize("way", WAYS)
def test_5_a_task_is_added_run_and_its_result_read(celerytest: PrintedProject, way: str) -> None:
    task_id = celerytest.run("python add_task.py").strip()
    result = celerytest.folder / "result.py"
    result.write_text(result.read_text().replace("e919d97d-2938-4d0f-9265-fd8237dc2aa3", task_id))
    assert celerytest.run("python result.py") == "任务等待中被执行\n"

    line = way if way.startswith("python") else tutorial(5).line(way)
    with celerytest.start(line) as worker:
        eventually(lambda: celerytest.run("python result.py") == "9\n", every=0.2)
        assert worker.stop() == 0
        assert "123456" not in worker.log


# -- what beginners do


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_a_wrong_password_ends_the_command_and_is_told(celerytest: PrintedProject, command: str) -> None:
    celerytest.environment["CELERY_BROKER_URL"] = "redis://:wrong-one@127.0.0.1:6379/2"

    printed = celerytest.run(f"amqtask -A celery_app_task {command} -l info", code=1)

    assert f"{command}: cannot go on: Redis at 127.0.0.1:6379 refused the login" in printed
    assert "wrong-one" not in printed


@pytest.mark.parametrize("line", ["amqtask -A tasks worker", 'python -c "from tasks import add; add.delay(1, 2)"'])
def test_a_database_that_redis_does_not_have_is_told(project: PrintedProject, line: str) -> None:
    demo(project)
    project.environment["CELERY_BROKER_URL"] = "redis://127.0.0.1:6379/99"

    assert "has no such database" in project.run(line, code=1)


def test_a_worker_that_is_started_twice_is_told_so_and_so_is_the_first(project: PrintedProject) -> None:
    demo(project)

    with project.start("amqtask -A tasks worker") as first, project.start("amqtask -A tasks worker") as second:
        for worker in (first, second):
            worker.await_log("another worker named celery@")


def test_commands_take_the_application_where_celery_4_had_it(project: PrintedProject) -> None:
    demo(project)

    project.run("python -c 'from tasks import add; add.delay(1, 2)'")
    assert project.run("amqtask purge -A tasks -f") == "Purged 1 message from 1 queue.\n"
    with project.start("amqtask worker -A tasks -l info -n w@here"):
        assert "w@here: OK" in project.run("amqtask status -A tasks")
        assert "tasks.add" in project.run("amqtask inspect registered -A tasks")


def test_tasks_that_no_worker_knows_and_results_that_are_not_kept_are_told(project: PrintedProject) -> None:
    demo(project)
    tasks = (project.folder / "tasks.py").read_text()
    project.write({"nothing_kept.py": tasks.replace(", backend='redis://127.0.0.1'", "")})
    unknown = "from tasks import app; app.send_task('tasks.sub', (1, 2)).get(timeout=60)"

    with project.start("amqtask -A tasks worker -l info") as worker:
        assert "no task 'tasks.sub' is registered in this worker" in project.run(f'python -c "{unknown}"', code=1)
        printed = project.run("python -c 'from nothing_kept import add; add.delay(1, 2).get()'", code=1)
        assert "set result_backend" in printed
        worker.await_log("is dead-lettered: no task 'tasks.sub' is registered")
    assert "tasks.sub" in project.run("amqtask -A tasks dead list")


def test_several_workers_are_started_and_stopped_together(project: PrintedProject) -> None:
    demo(project)

    started = project.run("amqtask multi start w1 w2 -A tasks -l info")
    try:
        eventually(lambda: "2 nodes online" in project.run("amqtask -A tasks status"))
    finally:
        stopped = project.run("amqtask multi stopwait w1 w2")
    assert [line.split("@")[0] for line in started.splitlines()] == ["> Starting nodes...", "    > w1", "    > w2"]
    assert stopped.count("OK") == 2
