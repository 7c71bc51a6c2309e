"""`amqtask multi`: which workers with which commands; the examples of `celery multi`'s documentation."""

from __future__ import annotations

import json
import os
import shlex
import socket
from pathlib import Path

import pytest

from amqtask.cli.main import run

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> object:
    """`amqtask multi show …`: node name → the worker's arguments without the files."""

    def show(line: str, before: str = "") -> dict[str, str]:
        assert run([*shlex.split(before), "multi", "show", *shlex.split(line)]) == 0
        found: dict[str, str] = {}
        for command in capsys.readouterr().out.splitlines():
            words = shlex.split(command)
            assert words[1:3] == ["-m", "amqtask"]
            at = words.index("-n")
            assert words[at - 2 : at] == ["worker", "--detach"]
            kept = [word for word in words[at + 2 :] if not word.startswith(("--pidfile=", "--logfile="))]
            found[words[at + 1]] = " ".join([*words[3 : at - 2], *kept])
        return found

    return show


EXAMPLES = [
    ("Leslie -E", {"Leslie": "-E"}),
    ("-E Leslie", {"Leslie": "-E"}),
    ("3 -c 3", {"celery1": "-c 3", "celery2": "-c 3", "celery3": "-c 3"}),
    ("2 --range-prefix=worker -c 3", {"worker1": "-c 3", "worker2": "-c 3"}),
    ("image video data -c 3", {"image": "-c 3", "video": "-c 3", "data": "-c 3"}),
    ("2 --hostname=worker.example.com", {"celery1@worker.example.com": "", "celery2@worker.example.com": ""}),
    ("2 -n worker.example.com", {"celery1@worker.example.com": "", "celery2@worker.example.com": ""}),
    ("foo@worker.example.com bar@worker.example.com", {"foo@worker.example.com": "", "bar@worker.example.com": ""}),
    ("foo@%h bar@%h", {"foo": "", "bar": ""}),
    (
        "6 -l INFO -Q:1-3 images,video -Q:4,5 data -Q default -L:4,5 DEBUG",
        {
            "celery1": "-l INFO -Q images,video",
            "celery2": "-l INFO -Q images,video",
            "celery3": "-l INFO -Q images,video",
            "celery4": "--loglevel=DEBUG -Q data",
            "celery5": "--loglevel=DEBUG -Q data",
            "celery6": "-l INFO -Q default",
        },
    ),
    ("3 -c 3 -c:1 10", {"celery1": "-c 10", "celery2": "-c 3", "celery3": "-c 3"}),
    ("image video data -c 3 -c:image 10", {"image": "-c 10", "video": "-c 3", "data": "-c 3"}),
    ("image video -c:2 10", {"image": "", "video": "-c 10"}),
    ("3 -c 3 -c:1-2 10", {"celery1": "-c 10", "celery2": "-c 10", "celery3": "-c 3"}),
    ("foo bar baz -c 3 -c:foo,bar 10", {"foo": "-c 10", "bar": "-c 10", "baz": "-c 3"}),
    ("a-1 b --concurrency:a-1=2 --concurrency 3", {"a-1": "--concurrency=2", "b": "--concurrency=3"}),
    ("a -c3 -Aproj:app -P eventlet", {"a": "-A proj:app -c 3 -P eventlet"}),
    ("a b -- --without-gossip", {"a": "--without-gossip", "b": "--without-gossip"}),
    ("w --prefix=big- --suffix=box", {"big-w@box": ""}),
]


@pytest.mark.parametrize(("line", "wanted"), EXAMPLES, ids=[line for line, _ in EXAMPLES])
def test_celery_s_examples(line: str, wanted: dict[str, str], shown) -> None:  # type: ignore[no-untyped-def]
    assert shown(line) == {name if "@" in name else f"{name}@{HOST}": words for name, words in wanted.items()}


def test_options_before_multi_go_to_each_worker(shown) -> None:  # type: ignore[no-untyped-def]
    assert shown("1 -c 2", before="-A proj -b amqp://box//") == {
        f"celery1@{HOST}": "--app=proj --broker=amqp://box// -c 2"
    }
    assert shown("1 -A other", before="-A proj") == {f"celery1@{HOST}": "-A other"}


def test_files_are_named_after_the_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["multi", "show", "--json", "foo@a.b.c", "bar", "--pidfile=/run/x/%n-%d.pid", "--logfile:2=~/%n%I.log"])
        == 0
    )

    foo, bar = json.loads(capsys.readouterr().out)
    assert (foo["name"], foo["pid"], foo["pidfile"]) == ("foo@a.b.c", None, "/run/x/foo-b.c.pid")
    assert foo["logfile"] == str(folder / "foo.log")
    assert bar["logfile"] == os.path.expanduser("~/bar.log")
    # %I is the worker's to expand: another name for each of its processes.
    assert f"--logfile={os.path.expanduser('~/bar%I.log')}" in bar["command"]
    assert f"--logfile={folder / 'foo%I.log'}" in foo["command"]


def test_names_expand_and_get(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["multi", "names", "2"]) == 0
    assert run(["multi", "expand", "%n at %h (%d)", "foo@a.b.c"]) == 0
    assert run(["multi", "get", "bar", "foo", "bar", "-c", "3"]) == 0

    first, second, expanded, command = capsys.readouterr().out.splitlines()
    assert [first, second] == [f"celery1@{HOST}", f"celery2@{HOST}"]
    assert expanded == "foo at a.b.c (b.c)"
    assert f"-n bar@{HOST} -c 3" in command
    assert run(["multi", "get", "baz", "foo", "bar"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strat", "3"], "no action 'strat'"),
        (["start"], "name the nodes"),
        (["show", "0"], "0 nodes"),
        (["show", "3", "-c:4", "1"], "-c:4"),
        (["show", "a", "b", "-c:c", "1"], "-c:c"),
        (["show", "a", "a"], "two nodes"),
        (["show", "2", "-n", "w@%h"], "host only"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["multi", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_stale_pid_file_is_no_running_worker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.pid").write_text(f"{os.getpid()}\n")  # a living process, but not that worker

    assert run(["multi", "kill", "a"]) == 0
    assert "DOWN" in capsys.readouterr().out
