"""The command lines that the documentation shows have commands and options that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from amqtask.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LINE = re.compile(r"^(?: {4}(?:\$ )?|\$ )(amqtask [-a-z].*)$", re.MULTILINE)
LINES = [
    pytest.param(found[1], id=f"{page.name}: {found[1][:60]}")
    for page in PAGES
    for found in LINE.finditer(page.read_text())
]


def deployed() -> list[str]:
    """The command lines of the image, the compose file, the units and the manifests."""
    (image,) = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    commands = [json.loads(image)]
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    commands += [service["command"] for service in services if "command" in service]
    for manifest in (ROOT / "deploy" / "kubernetes").glob("*.yaml"):
        for document in yaml.safe_load_all(manifest.read_text()):
            if document["kind"] == "Deployment":
                commands += [container["args"] for container in document["spec"]["template"]["spec"]["containers"]]
    for unit in (ROOT / "deploy" / "systemd").glob("*.service"):
        (line,) = re.findall(r"^ExecStart=\S+/amqtask (.*)$", unit.read_text(), re.MULTILINE)
        commands.append(shlex.split(line.replace("$WORKER_OPTIONS", "-Q orders -c 8 -l INFO")))
    return [shlex.join(["amqtask", *command]) for command in commands]


def words_of(line: str) -> list[str]:
    """The words after `amqtask`, up to a pipe or a redirection."""
    words = shlex.split(line, comments=True)[1:]
    return words[: next((at for at, word in enumerate(words) if word in ("|", ">")), len(words))]


def takes_value(command: click.Command, word: str) -> bool:
    """Whether the option's value is the next word. Fails when there is no such option."""
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    name, equals, _ = word.partition("=")
    if not name.startswith("--"):
        name, equals = name[:2], name[2:]  # -c5
    assert name in options, f"{command.name} has no option {name}"
    option = options[name]
    return isinstance(option, click.Option) and not (option.is_flag or option.count or equals)


@pytest.mark.parametrize("line", [*LINES, *deployed()])
def test_what_the_documentation_shows_exists(line: str) -> None:
    words = words_of(line)
    command: click.Command = cli
    while words:
        word = words.pop(0)
        # multi's words are those of other commands, flower's are Flower's.
        if command.name in ("multi", "flower") or word in ("--", "--help"):
            return
        if word.startswith("-"):
            if takes_value(command, word):
                words.pop(0)
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"{command.name} has no command {word}"
            command = found
    assert not isinstance(command, click.Group) or command.invoke_without_command, f"{command.name} wants a command"


def test_there_are_lines_to_look_at() -> None:
    assert len(LINES) > 20
