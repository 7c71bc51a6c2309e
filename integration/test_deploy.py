"""What is deployed: manifests and units are valid, and the image's root runs a worker that is not root and drains on TERM."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from amqtask import AmqTask
from integration.conftest import Broker
from integration.machine import NodeError, free_port
from integration.projects import Project
from integration.roots import python_root
from integration.waiting import PATIENT
from integration.workers import eventually

ROOT = Path(__file__).parent.parent
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
# Kubernetes' own schemas do not know them.
CUSTOM = {"Kustomization", "ScaledObject", "TriggerAuthentication"}
TASKS = """
import os, subprocess, time
from amqtask import AmqTask

app = AmqTask("shop", result_backend="rpc://", task_default_queue=os.environ["SHOP_QUEUE"])


@app.task(name="pack")
def pack(file, seconds):
    subprocess.Popen(["sh", "-c", "sleep 0.1 &"])  # an orphan
    open(file, "w").close()
    time.sleep(seconds)
    return os.getuid()
"""


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def test_manifests_are_what_kubernetes_takes() -> None:
    validating: Any = pytest.importorskip("kubernetes_validate")

    for name, document in documents():
        if document["kind"] not in CUSTOM:
            validating.validate(document, "1.34", strict=True)
        elif document["kind"] == "ScaledObject":
            assert all(
                isinstance(value, str) for each in document["spec"]["triggers"] for value in each["metadata"].values()
            )
        assert document["kind"] == "Kustomization" or document["metadata"]["name"], name


def test_selectors_select_and_pods_are_restricted() -> None:
    workloads = {
        document["metadata"]["name"]: document for _, document in documents() if document["kind"] == "Deployment"
    }
    for workload in workloads.values():
        template = workload["spec"]["template"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
    for _, document in documents():
        if document["kind"] == "PodDisruptionBudget":
            labels = workloads[document["metadata"]["name"]]["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if document["kind"] == "ScaledObject":
            assert document["spec"]["scaleTargetRef"]["name"] in workloads


def test_kustomize_finds_all_that_it_names() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(
        [kubectl, "kustomize", MANIFESTS[0].parent], capture_output=True, text=True, check=True
    ).stdout

    kinds = [document["kind"] for document in yaml.safe_load_all(built)]
    assert (kinds.count("Deployment"), kinds.count("PodDisruptionBudget"), kinds.count("NetworkPolicy")) == (3, 2, 1)


def test_compose_takes_the_file_and_it_has_the_console() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("needs docker-compose; it looks at a file without an engine")
    done = subprocess.run(
        ["docker-compose", "-f", ROOT / "compose.yaml", "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert services.keys() == {"rabbitmq", "worker", "beat", "relay", "console"}
    assert {service["image"] for service in services.values()} == {"amqtask", "rabbitmq:4.3-management"}
    assert services["console"]["environment"]["AMQTASK_CONSOLE_USER"].startswith("amqtask:scrypt$")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    written = tmp_path / unit.name.replace("@.", "@orders.")
    written.write_text(unit.read_text().replace("/opt/amqtask/bin/amqtask", "/bin/true"))

    done = subprocess.run([analyze, "verify", str(written)], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if unit.name.split(".")[0].rstrip("@") in line] == []


def beats() -> Iterator[Any]:
    """A beat's command line and what asks whether it is well, of the compose file and of the manifest."""
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["beat"]
    yield pytest.param(service["command"], service["healthcheck"]["test"][1].replace("$$", "$"), id="compose")
    (deployment,) = (
        each for _, each in documents() if each["kind"] == "Deployment" and each["metadata"]["name"] == "beat"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    yield pytest.param(container["args"], container["livenessProbe"]["exec"]["command"][-1], id="kubernetes")


@pytest.mark.parametrize(("words", "probe"), [*beats()])
def test_beat_answers_what_asks_whether_it_is_well(
    words: list[str], probe: str, broker_url: str, tmp_path: Path
) -> None:
    project = Project(tmp_path, broker_url=broker_url, AMQTASK_APP="shop", SHOP_QUEUE="probed")
    (tmp_path / "shop.py").write_text(TASKS)
    beat = shlex.join(words).replace("/var/lib/amqtask", str(tmp_path))
    with project.start(f"amqtask {beat}", ready="beat: Starting..."):
        asked = ["sh", "-c", probe]
        eventually(
            lambda: subprocess.run(
                asked, cwd=tmp_path, env={**os.environ, **project.environment}, capture_output=True, check=False
            ).returncode == 0,
            what=probe,
        )  # fmt: skip


# -- the image


class Image:
    """The Dockerfile's steps, done in a chroot in place of an image. Of the two stages the first leaves its files where the
    second one copies them to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
        self.user, self.folder = "0:0", "/"
        self.words: dict[str, Any] = {}
        self._arguments: dict[str, str] = {}
        text = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
        for line in text.splitlines():
            if line and not line.startswith("#"):
                self._step(*line.split(None, 1))

    def _step(self, instruction: str, rest: str) -> None:
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            self._arguments[name] = value
        elif instruction == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif instruction == "WORKDIR":
            self.folder = rest
            (self.root / rest[1:]).mkdir(exist_ok=True)
        elif instruction == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                self._copy(ROOT / source, self.root / self.folder[1:] / target)
        elif instruction == "RUN":
            done = subprocess.run(
                self.command("sh", "-ec", rest), env={**self.environment, **self._arguments}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{rest}: {done.stdout}{done.stderr}"
        elif instruction == "USER":
            self.user = rest
        elif instruction == "HEALTHCHECK":
            self.words[instruction] = json.loads(rest[rest.index("[") :])
        elif instruction in ("ENTRYPOINT", "CMD", "STOPSIGNAL"):
            self.words[instruction] = json.loads(rest) if rest.startswith("[") else rest

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)

    def command(self, *words: str) -> list[str]:
        """In the image, as its user and in its folder."""
        chroot = [shutil.which("chroot") or "/usr/sbin/chroot", f"--userspec={self.user}", str(self.root)]
        return [*chroot, "env", "-C", self.folder, *words]

    def is_healthy(self, environment: Mapping[str, str], port: int) -> bool:
        """What the HEALTHCHECK says, on another port."""
        words = [word.replace("8080", str(port)) for word in self.words["HEALTHCHECK"]]
        return subprocess.run(self.command(*words), env=environment, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image's root."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    root = tmp_path_factory.mktemp("image") / "root"
    try:
        subprocess.run(["cp", "-a", python_root(ROOT / ".roots"), root], check=True)  # with its devices
    except NodeError as error:
        pytest.skip(str(error))
    for file in ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt"):
        shutil.copy(f"/{file}", root / file)
    yield Image(root)
    shutil.rmtree(root)


@pytest.mark.slow
def test_the_images_worker_is_not_root_is_pid_1_and_drains_on_term(image: Image, rabbit: Broker) -> None:
    queue, port = rabbit.queue("image"), free_port()
    (image.root / "app" / "shop.py").write_text(TASKS)
    environment = {
        **image.environment,
        "AMQTASK_APP": "shop",
        "AMQTASK_BROKER_URL": rabbit.url,
        "AMQTASK_WORKER_HEALTH_PORT": str(port),
        "AMQTASK_WORKER_METRICS_PORT": str(port),
        "SHOP_QUEUE": queue,
    }
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT, set_as_current=False)
    main = image.command(*image.words["ENTRYPOINT"], *image.words["CMD"])
    inside = ["unshare", "--pid", "--fork", "--mount", f"--mount-proc={image.root}/proc"]
    begun = image.root / "tmp" / "begun"
    with subprocess.Popen([*inside, *main], env=environment) as worker:
        try:
            eventually(lambda: image.is_healthy(environment, port), what="HEALTHCHECK")
            packed = app.send_task("pack", ("/tmp/begun", 2), queue=queue)
            eventually(begun.exists, what="a task that runs")
            (pid,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            os.kill(int(pid), getattr(signal, image.words["STOPSIGNAL"]))

            assert worker.wait(timeout=120) == 0
        finally:
            worker.kill()
    assert status["NSpid"].split()[-1] == "1"
    assert set(status["Uid"].split()) == {"10001"}
    assert packed.get(timeout=60) == 10001
    app.close()
