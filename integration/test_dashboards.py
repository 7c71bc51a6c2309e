"""Alert rules and the dashboard: each alert fires from recorded series, each query finds series of a real worker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from amqtask import AmqTask
from integration.conftest import Broker
from integration.machine import free_port
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "amqtask.rules.yml"
TESTS = DEPLOY / "prometheus" / "amqtask.rules.test.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "amqtask.json").read_text())
SAMPLE = "integration.apps.sample"
VARIABLES = {
    "$__rate_interval": "1m", "$__range": "1h", "$job": ".*", "$queue": ".*", "$task": ".*",
}  # fmt: skip


def program(name: str) -> str:
    """A program of Prometheus'; its tests are skipped without."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (Debian's package prometheus)")
    return path


def promtool(*arguments: str | Path) -> str:
    """What it says. Raises: AssertionError when it is not content."""
    done = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    """Every query of the dashboard, with its variables replaced."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    for name, value in VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    return found


def test_prometheus_takes_the_rules_and_each_alert_fires_when_it_should() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", TESTS)

    tested = {test["name"] for test in yaml.safe_load(TESTS.read_text())["tests"]}
    assert tested == {rule["alert"] for rule in alerts()} | {"a healthy worker"}


def test_a_rule_that_would_not_fire_is_found(tmp_path: Path) -> None:
    for rule in ("> 0.05", "increase(amqtask_dead_letters_total[15m])) > 0"):
        blunt = tmp_path / RULES.name
        blunt.write_text(RULES.read_text().replace(rule, rule.rsplit(" ", 1)[0] + " 1000"))
        shutil.copy(TESTS, tmp_path)

        done = subprocess.run(
            [program("promtool"), "test", "rules", str(tmp_path / TESTS.name)], capture_output=True, check=False
        )
        assert done.returncode == 1


def test_each_alert_says_what_is_wrong_and_the_page_what_to_do() -> None:
    page = (DEPLOY.parent / "docs" / "alerts.md").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() >= {"summary", "description"}
        assert f"`{rule['alert']}`" in page


def test_the_dashboards_queries_are_prometheus_and_its_panels_do_not_overlap(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries())]
    written = tmp_path / "queries.yml"
    written.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    assert f"{len(rules)} rules found" in promtool("check", "rules", written)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24


@pytest.fixture
def prometheus(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    """The port that it scrapes, and where it answers."""
    scraped, port = free_port(), free_port()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "shop", "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with subprocess.Popen(
        [
            program("prometheus"), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        yield scraped, f"http://127.0.0.1:{port}"
        server.terminate()


def ask(url: str, query: str) -> list[Any]:
    """The series that a query has now."""
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}", timeout=30) as response:
            result: list[Any] = json.load(response)["data"]["result"]
            return result
    except OSError:
        return []  # it has just begun


def test_every_query_finds_series_of_a_real_worker(rabbit: Broker, prometheus: tuple[int, str]) -> None:
    scraped, url = prometheus
    queue = rabbit.queue("dashboard")
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT, task_send_timestamp=True)
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "2", "--metrics-port", str(scraped), "--http-host", "127.0.0.1"):

        def work() -> None:
            app.send_task("sample.add", (1, 2), queue=queue).get(timeout=90)
            app.send_task("sample.fail", ("no",), queue=queue).get(timeout=90, propagate=False)
            app.send_task("sample.reject", queue=queue).get(timeout=90, propagate=False)

        work()
        eventually(lambda: ask(url, 'amqtask_tasks_total{state="REJECTED"}'), what="a first scrape")
        work()

        # This worker has no reason for redeliveries, and no tasks with limits or breakers.
        without = ("redeliveries", "amqtask_limit", "amqtask_breaker")
        asked = [query for query in queries() if not any(name in query for name in without)]
        for query in asked:
            eventually(lambda query=query: ask(url, query), what=query)  # type: ignore[misc]
    app.close()


def test_rules_and_dashboard_name_metrics_that_there_are() -> None:
    described = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(amqtask_\w+)`", "\n".join(re.findall(r"^\| `[^|]+", described, re.MULTILINE))))
    expressions = [*queries(), *(rule["expr"] for rule in alerts())]
    named = {
        re.sub(r"_(bucket|sum|count)$", "", name) for text in expressions for name in re.findall(r"amqtask_\w+", text)
    }

    assert named <= known
    assert named >= known - {"amqtask_task_runtime_seconds"}
