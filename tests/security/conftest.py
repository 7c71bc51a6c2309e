"""Signers, and a process without any before and after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask.protocol import encryption, serialization
from integration.signers import Signers


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Signers:
    signers = Signers(tmp_path_factory.mktemp("signers"))
    signers.add("one")
    signers.add("two")
    return signers


@pytest.fixture
def signers(made_once: Signers, tmp_path: Path) -> Signers:
    """A folder of the test's own with `one` and `two`."""
    own = Signers(tmp_path / "signers")
    for name in ("one", "two"):
        own.key(name).write_bytes(made_once.key(name).read_bytes())
        own.key(name).chmod(0o600)
        own.certificate(name).write_bytes(made_once.certificate(name).read_bytes())
    return own


@pytest.fixture(autouse=True)
def no_keys() -> Iterator[None]:
    """Keys are the process's."""
    yield
    serialization.sign_with(serialization._dump_signed, serialization._load_signed, is_private=False)
    encryption._said.clear()
    encryption._made.clear()
