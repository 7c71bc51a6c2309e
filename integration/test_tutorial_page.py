"""docs/tutorial.md, followed by hand: its files written, its lines typed, what they print compared."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from integration.nodes import free_port
from integration.projects import Project
from integration.waiting import eventually
from integration.workers import READY, ROOT, LoggedProcess

PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
# What says that a program which goes on is there.
# Lines that ask what has become of something are typed until it has.
QUESTIONS = ("dead list", "tasks find")
SAID = {"beat": "beat: ", "console": "http://127.0.0.1:"}


def test_the_tutorial_prints_what_it_says(tmp_path: Path, broker_url: str) -> None:
    with Terminal(Project(tmp_path, broker_url=broker_url)) as terminal:
        for kind, text in BLOCK.findall(PAGE.read_text()):
            if kind == "console":
                for typed in text.split("$ ")[1:]:
                    terminal.type(*typed.split("\n", 1))
            else:
                file = FILE.match(text)
                assert file is not None, text
                (tmp_path / file[1]).write_text(text)


class Terminal(contextlib.ExitStack):
    """Where lines are typed; programs in the background end with it."""

    def __init__(self, project: Project) -> None:
        super().__init__()
        self._project = project
        self._jobs: list[LoggedProcess] = []

    def type(self, line: str, printed: str) -> None:
        """Run a line, and look at what it prints."""
        line = line.replace("-p 5556", f"-p {free_port()}")
        if line.startswith("kill %"):
            assert self._jobs[int(line.removeprefix("kill %")) - 1].stop() == 0
        elif line.endswith(" &"):
            ready = next((said for word, said in SAID.items() if f" {word} " in line), READY)
            self._jobs.append(self.enter_context(self._project.start(line.removesuffix(" &"), ready=ready)))
        elif any(f" {question}" in line for question in QUESTIONS):
            eventually(lambda: matches(printed, self._project.run(line)), what=lambda: self._project.run(line))
        else:
            found = self._project.run(line)
            assert matches(printed, found), f"{line}\n{found}"


def matches(printed: str, found: str) -> bool:
    """Whether a program printed what the page says; `…` is anything."""
    return re.fullmatch(re.escape(printed).replace("…\\\n", ".*").replace("…", ".*"), found, re.DOTALL) is not None
