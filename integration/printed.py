"""The programs of the tutorials as they are printed, and a network of their own where the hosts in their URLs are.

Their texts are no part of this project: they lie in `shared/tutorials` beside the checkout. A test names a program by some words
of it, and a command line in full; `from celery` becomes `from amqtask`, the command `celery` becomes `amqtask`, and nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from integration.machine import NodeError, Server, program
from integration.projects import Project
from integration.waiting import LONG
from integration.workers import ROOT

TEXTS = ROOT.parent / "shared" / "tutorials"
# What is printed wrong, and no Python or Celery of today takes: `async` is a word of Python's since 3.7.
MISPRINTS = {
    "def add(x, y)\n": "def add(x, y):\n",
    "async = ": "found = ",
    "async.": "found.",
    "IntervalSchedule.object.": "IntervalSchedule.objects.",
}
# The command `env` and the words before the program: what the tests' own environment says of brokers is not for it.
FOREIGN = ("AMQTASK_", "CELERY_")


class Tutorial:
    """One of the texts. Raises: NodeError where it is not to be had."""

    def __init__(self, number: int) -> None:
        path = TEXTS / f"tutorial-{number}.md"
        if not path.exists():
            raise NodeError(f"{path} is not there: the tutorials' texts lie beside the checkout")
        self._text = path.read_text()
        self._blocks = re.findall(r"^ *```+[^\n]*\n(.*?)^ *```+ *$", self._text, re.MULTILINE | re.DOTALL)

    def program(self, *words: str, after: str = "", until: str = "") -> str:
        """The program that has all these words: what its block has after and before these ones, ready for amqtask."""
        (block,) = (block for block in self._blocks if all(word in block for word in words))
        if after:
            block = block.partition(after)[2]
        if until:
            block = block.partition(until)[0]
        return for_amqtask(textwrap.dedent(block))

    def programs(self, *words: str) -> list[str]:
        """All programs that have these words."""
        return [for_amqtask(textwrap.dedent(block)) for block in self._blocks if all(word in block for word in words)]

    def line(self, line: str) -> str:
        """A command line that stands in the text, as it is for amqtask."""
        assert line in self._text, f"not printed: {line}"
        return re.sub(r"^celery ", "amqtask ", line)


def for_amqtask(source: str) -> str:
    """A program with its imports of Celery changed, and without misprints."""
    for wrong, right in MISPRINTS.items():
        source = source.replace(wrong, right)
    source = source.replace("from django_celery_beat.models import", "from amqtask.contrib.django.models import")
    source = re.sub(r"^( *)import celery$", r"\1import amqtask as celery", source, flags=re.MULTILINE)
    return re.sub(r"^( *)from celery\b", r"\1from amqtask", source, flags=re.MULTILINE)


class OwnNetwork(Server):
    """A network with a Redis on the usual port, under the addresses and names that the tutorials have.

    Only the processes that `within` starts are in it, so a Redis of this machine is neither in the way nor touched. No root is
    needed where users may have namespaces.
    """

    def __init__(self, password: str = "") -> None:
        super().__init__("network")
        self._password = password
        self._hosts = self.folder / "hosts"
        self._hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 localhost redis\n")

    def start(self) -> OwnNetwork:
        """Start and return once its Redis answers. Raises: NodeError where there can be no such network."""
        program("redis-server", "redis-server")
        script = (
            'ip link set lo up && ip address add 10.8.238.2/32 dev lo && mount --bind "$0" /etc/hosts && '
            'exec redis-server --port 6379 --protected-mode no --save "" --requirepass "$1"'
        )
        self.run(
            [
                "unshare",
                "--user",
                "--map-root-user",
                "--net",
                "--mount",
                "sh",
                "-c",
                script,
                str(self._hosts),
                self._password,
            ],
            lambda: "Ready to accept connections" in self.log_tail(),
        )
        return self

    def within(self, folder: Path, environment: Mapping[str, str]) -> list[str]:
        """What comes before a program and its arguments."""
        enter = [
            "nsenter",
            f"--target={self.pid}",
            "--user",
            "--preserve-credentials",
            "--net",
            "--mount",
            "env",
            "--chdir",
        ]
        forget = [word for name in os.environ if name.startswith(FOREIGN) for word in ("-u", name)]
        return [*enter, str(folder), *forget, *(f"{name}={value}" for name, value in environment.items())]

    def ask(self, *words: str) -> str:
        """redis-cli; what it printed."""
        secret = {"REDISCLI_AUTH": self._password} if self._password else {}
        return self.once([*self.within(self.folder, secret), "redis-cli", *words])


class PrintedProject(Project):
    """A folder with printed programs, run in a network of their own."""

    def __init__(self, folder: Path, network: OwnNetwork) -> None:
        super().__init__(folder)
        self._network = network

    def write(self, files: Mapping[str, str]) -> None:
        """Programs by their paths. Folders are packages where they have an `__init__.py` of their own."""
        for name, source in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    def http(self, url: str, form: str = "") -> str:
        """Status and text of a page of a server in that network; a form is posted."""
        return self.run(shlex.join(["python", "-c", ASK, url, form]), timeout=LONG)

    def _command(self, line: str) -> list[str]:
        return [*self._network.within(self.folder, self.environment), *super()._command(line)]


ASK = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], sys.argv[2].encode() or None, timeout=90)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode(), end="")
"""

__all__: Sequence[str] = ("OwnNetwork", "PrintedProject", "Tutorial", "for_amqtask")
