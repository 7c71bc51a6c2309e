"""What strangers write does nothing to a terminal and makes no line of its own."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask.cli.base import echo, echo_text, print_json, print_table
from amqtask.ground.printable import printable, printable_lines

HOSTILE = "\x1b[2J\x1b]0;title\x07\rroot\n\x9b31m\u202egnp.exe\u2028\ud800"


@settings(deadline=None)
@given(st.text(st.characters()))
def test_no_control_character_is_left(text: str) -> None:
    for character in printable_lines(text).replace("\n", "") + printable(text):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs")


def test_all_that_commands_print_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo_text(HOSTILE)
    print_table(["ID"], [[HOSTILE]])
    print_json({HOSTILE: [HOSTILE]})

    said = capsys.readouterr().out

    for character in "\x1b\x07\r\x9b\u202e\u2028\ud800":
        assert character not in said
    assert json.loads(said[said.index("{") :]) == {HOSTILE: [HOSTILE]}


def test_an_echo_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    echo("id-1  task\nid-2  forged")

    assert capsys.readouterr().out == "id-1  task\\nid-2  forged\n"


def test_text_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    echo_text("Grüße, 世界\n\x07  tasks.add")

    assert capsys.readouterr().out == "Grüße, 世界\n\\x07  tasks.add\n"
