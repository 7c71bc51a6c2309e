"""`amqtask schema`: what it makes is taken by those whose it is, and a program in TypeScript calls tasks with it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest

from integration import node_peer
from integration.conftest import Broker
from integration.machine import NodeError
from integration.waiting import eventually
from integration.workers import WorkerProcess, run_cli

APP = "integration.apps.described"
COMPILER = {"strict": True, "target": "es2022", "module": "nodenext", "skipLibCheck": True, "noUnusedLocals": True}
CALLS = """
import { Producer, Unroutable } from "./producer.js";

const producer = await Producer.connect(process.argv[2]!);
await producer.call("orders.place", { order: { id: 7, lines: [{ sku: "a" }, { sku: "b", count: 2 }] }, how: "slow" });
await producer.call("told", { first: 1, size: [3, 4], loud: true }, { rest: ["x", "y"] });
try {
  await producer.call("told", { first: 1, size: [3, 4] }, { queue: "there-is-no-such-queue" });
} catch (error) {
  console.log(error instanceof Unroutable);
}
await producer.close();
"""
WRONG = """
import { Producer } from "./producer.js";

declare const producer: Producer;
producer.call("orders.plcae", { order: { id: 7, lines: [] } });
producer.call("orders.place", { order: { id: "7", lines: [] } });
producer.call("orders.place", { order: { id: 7, lines: [] }, how: "never" });
producer.call("orders.place", {});
producer.call("told", { first: 1, size: [3] });
"""


@pytest.fixture(scope="session")
def packages() -> Path:
    """Node's."""
    try:
        return node_peer.modules()
    except NodeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def folder(packages: Path, tmp_path: Path) -> Path:
    """A Node project."""
    (tmp_path / "node_modules").symlink_to(packages)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": COMPILER}))
    return tmp_path


def compiled(folder: Path, name: str, program: str) -> list[str]:
    """What the compiler has against the program, beside the producer that it imports."""
    (folder / name).write_text(program)
    compiler = ["node", "node_modules/typescript/bin/tsc", "--project", "."]
    done = subprocess.run(compiler, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return [line for line in done.stdout.splitlines() if not line.startswith(" ")]


def test_a_program_in_typescript_calls_tasks(rabbit: Broker, folder: Path) -> None:
    queue, file = rabbit.queue("described"), folder / "runs"
    environment = {"AMQTASK_BROKER_URL": rabbit.url, "DESCRIBED_QUEUE": queue, "DESCRIBED_FILE": str(file)}
    code, said = run_cli(
        "-A", APP, "schema", "--typescript", "-o", str(folder / "producer.ts"), environment=environment
    )
    assert (code, said) == (0, "")
    assert compiled(folder, "calls.ts", CALLS) == []

    with WorkerProcess(APP, "-P", "threads", "-Q", f"{queue},{queue}-orders", environment=environment):
        done = node_peer.run(folder, "calls.js", rabbit.url)
        assert (done.returncode, done.stdout) == (0, "true\n"), done.stderr
        eventually(lambda: file.exists() and len(file.read_text().splitlines()) == 2)
    runs = sorted(map(json.loads, file.read_text().splitlines()))
    assert runs == [["place", 7, ["a", "b"], 3, "slow"], ["told", 1, ["x", "y"], [3, 4], {"loud": True}]]


def test_the_compiler_finds_wrong_calls(folder: Path) -> None:
    assert run_cli("-A", APP, "schema", "--typescript", "-o", str(folder / "producer.ts"))[0] == 0

    complaints = compiled(folder, "wrong.ts", WRONG)
    assert [line.partition("(")[2].partition(",")[0] for line in complaints] == ["5", "6", "7", "8", "9"], complaints


def test_the_document_is_asyncapi(packages: Path) -> None:
    specification = json.loads((packages / "@asyncapi" / "specs" / "schemas" / "3.0.0.json").read_text())
    code, document = run_cli("-A", APP, "schema", "--asyncapi")
    assert code == 0
    assert [
        error.message for error in jsonschema.Draft7Validator(specification).iter_errors(json.loads(document))
    ] == []
