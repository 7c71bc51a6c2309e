"""Which MongoDB, and which database in it, URL and settings name together."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.backends.mongodb import Server, server_of
from amqtask.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("url", "settings", "expected"),
    [
        ("mongodb://", {}, Server("mongodb://localhost", "celery", "localhost:27017")),
        ("mongodb://h:1/shop", {}, Server("mongodb://h:1/shop", "shop", "h:1")),
        ("mongodb://h/shop", {"database": "other"}, Server("mongodb://h/shop", "other", "h:27017")),
        (
            "mongodb://a:1,b:2/shop?replicaSet=r",
            {},
            Server("mongodb://a:1,b:2/shop?replicaSet=r", "shop", "a:1, b:2"),
        ),
        ("mongodb://u:secret@h/shop", {}, Server("mongodb://u:secret@h/shop", "shop", "h:27017")),
        (
            "mongodb://h/shop",
            {"user": "u@x", "password": "se/cret"},
            Server("mongodb://u%40x:se%2Fcret@h/shop", "shop", "h:27017"),
        ),
        ("mongodb://h/shop", {"host": "other", "port": 5}, Server("mongodb://other:5", "celery", "other:5")),
        (
            "mongodb+srv://u:secret@h.example/shop?w=1",
            {},
            Server("mongodb+srv://u:secret@h.example/shop?w=1", "shop", "h.example/shop"),
        ),
    ],
)
def test_url_and_settings_name_a_server(url: str, settings: dict[str, Any], expected: Server) -> None:
    assert server_of(url, settings) == expected
    assert not settings
    assert "secret" not in server_of(url, {}).hosts


def test_a_url_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"mongodb://… cannot be read"):
        server_of("mongodb://h:notaport/shop", {})
