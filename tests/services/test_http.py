"""What the monitors' HTTP server says to good, strange and bad requests."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from amqtask.services.metrics import Reply, respond, text


def hello(headers: Mapping[str, str]) -> Reply:
    return text(200, f"hello {headers.get('user-agent', 'nobody')}")


def broken(headers: Mapping[str, str]) -> Reply:
    raise RuntimeError("out of paper")


PAGES = {"/hello": hello, "/broken": broken}


def ask(request: str) -> tuple[str, dict[str, str], str]:
    """Status line, headers and body of the response."""
    head, _, body = respond(request.encode(), PAGES).decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return status, dict(line.split(": ", 1) for line in lines), body


def test_a_page_gets_the_headers_whatever_their_case() -> None:
    status, headers, body = ask("GET /hello HTTP/1.1\r\nHost: x\r\nuser-AGENT:  kube-probe/1.33 ")

    assert (status, body) == ("HTTP/1.1 200 OK", "hello kube-probe/1.33\n")
    assert headers["Content-Length"] == str(len(body))
    assert headers["Connection"] == "close"


def test_a_query_belongs_to_nobody() -> None:
    assert ask("GET /hello?name[]=x HTTP/1.1")[2] == "hello nobody\n"


def test_head_has_the_length_and_no_body() -> None:
    status, headers, body = ask("HEAD /hello HTTP/1.1")

    assert (status, headers["Content-Length"], body) == ("HTTP/1.1 200 OK", "13", "")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /elsewhere HTTP/1.1", "404 Not Found"),
        ("POST /hello HTTP/1.1", "405 Method Not Allowed"),
        ("GET /hello HTTP/2.0", "400 Bad Request"),
        ("GET /hello", "400 Bad Request"),
        ("", "400 Bad Request"),
        ("\x16\x03\x01 what a TLS client says", "400 Bad Request"),
        ("GET /broken HTTP/1.1", "500 Internal Server Error"),
    ],
)
def test_what_cannot_be_answered_is_refused(request_line: str, status: str) -> None:
    assert ask(request_line)[0] == f"HTTP/1.1 {status}"


def test_who_asks_for_the_wrong_page_is_told_the_right_ones() -> None:
    assert ask("GET / HTTP/1.1")[2] == "there are: /broken, /hello\n"
