"""A backend is found by its URL's scheme."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from amqtask.backends.contract import BackendOptions
from amqtask.backends.memory import MemoryBackend
from amqtask.backends.registry import GROUP, OURS, open_backend
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


def test_a_missing_library_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "amqtask.backends.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)

    with pytest.raises(ConfigurationError, match=r'pip install "amqtask\[redis\]"'):
        open_backend("rediss://localhost", BackendOptions(url="rediss://localhost"))


def test_the_entry_points_say_what_the_table_says() -> None:
    declared = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}

    assert {name: declared.get(name) for name in OURS} == OURS
