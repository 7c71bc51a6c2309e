"""A backend is found by its URL's scheme."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from amqtask.backends.contract import BackendOptions
from amqtask.backends.memory import MemoryBackend
from amqtask.backends.registry import GROUPS, OURS, find_backend, open_backend
from amqtask.exceptions import ConfigurationError


@pytest.mark.parametrize("url", [None, "", "disabled", "disabled://"])
def test_no_url_means_no_backend(url: str | None) -> None:
    assert open_backend(url, BackendOptions(url="")) is None


@pytest.mark.parametrize("url", ["cache+memory://", "cache+memory", "CACHE+MEMORY://"])
def test_a_scheme_finds_its_backend(url: str) -> None:
    assert isinstance(open_backend(url, BackendOptions(url=url)), MemoryBackend)


def test_an_unknown_scheme_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"redi://.*Did you mean redis://"):
        open_backend("redi://localhost", BackendOptions(url="redi://localhost"))


@pytest.mark.parametrize(
    ("url", "module", "library", "extra"),
    [
        ("redis://localhost", "redis", "redis", "redis"),
        ("rediss://localhost", "redis", "redis", "redis"),
        ("sentinel://localhost", "redis", "redis", "redis"),
        ("redis+cluster://localhost", "redis", "redis", "redis"),
        ("db+sqlite:///results.db", "sql", "sqlalchemy", "sqlalchemy"),
        ("cache+memcached://localhost", "memcached", "pymemcache", "memcached"),
        ("mongodb://localhost", "mongodb", "pymongo", "mongodb"),
    ],
)
def test_a_missing_library_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, library: str, extra: str
) -> None:
    for name in [f"amqtask.backends.{module}", *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ConfigurationError, match=rf'pip install "amqtask\[{extra}\]"'):
        open_backend(url, BackendOptions(url=url))


def test_sentinels_must_be_told_which_master() -> None:
    with pytest.raises(ConfigurationError, match="master_name"):
        open_backend("sentinel://localhost", BackendOptions(url="sentinel://localhost"))


def test_a_memcached_url_must_name_a_server() -> None:
    with pytest.raises(ConfigurationError, match="cache\\+memcached://host:11211"):
        open_backend("cache+memcached://", BackendOptions(url="cache+memcached://"))


def test_the_entry_points_say_what_the_table_says() -> None:
    declared = {point.name: point for point in importlib.metadata.entry_points(group=GROUPS[0])}

    assert {name: find_backend(name) for name in OURS} == {name: declared[name].load() for name in OURS}


def test_the_type_of_the_queues_of_results_is_one_that_keeps_them() -> None:
    options = BackendOptions(url="rpc://", transport_options=(("queue_type", "stream"),))

    with pytest.raises(ConfigurationError, match="'classic' or 'quorum', not 'stream'"):
        open_backend("rpc://", options)
