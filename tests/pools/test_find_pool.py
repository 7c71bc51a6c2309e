"""Pools by name, and the words for those that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amqtask.exceptions import PoolNotFound
from amqtask.pool import find_pool, limits_of


def test_a_pool_is_found_by_its_name() -> None:
    assert find_pool("threads").name == "threads"
    assert find_pool("processes").name == "prefork"


def test_the_entry_points_say_the_same_as_the_module() -> None:
    # In a process of its own: once eventlet is imported, it warns of each fork.
    program = """
import importlib.metadata
from amqtask.pool import GROUP, OURS, find_pool
declared = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
print([name for name in OURS if find_pool(name) is not declared[name].load()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_pool_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    assert _with_pool_mine(tmp_path, "    name = 'mine'", "print(pool.name)") == "mine"


def test_a_pool_has_all_members_of_the_contract_and_need_not_derive_from_it(tmp_path: Path) -> None:
    members = "    limits = frozenset({'hard'})"
    program = "print(*limits_of(pool, is_async=False), pool().can_restart)"

    assert _with_pool_mine(tmp_path, members, program) == "hard False"
    assert _with_pool_mine(tmp_path, members + "; restart = print", program) == "hard True"


def _with_pool_mine(tmp_path: Path, members: str, program: str) -> str:
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[amqtask.pools]\nmine = mine:Pools.Mine\n")
    (tmp_path / "mine.py").write_text(f"class Pools:\n  class Mine:\n{members}\n")
    program = f"from amqtask.pool import find_pool, limits_of; pool = find_pool('mine'); {program}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-B", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_an_unknown_name_gets_near_ones_and_the_list() -> None:
    with pytest.raises(PoolNotFound) as caught:
        find_pool("eventlt")

    assert "Did you mean 'eventlet'" in str(caught.value)
    assert "prefork" in str(caught.value)


def test_a_missing_library_is_named_with_the_command_that_installs_it() -> None:
    program = """
import sys
sys.modules["gevent"] = None
from amqtask.exceptions import PoolNotFound
from amqtask.pool import find_pool
try:
    find_pool("gevent")
except PoolNotFound as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert 'pip install "amqtask[gevent]"' in done.stdout


def test_the_contract_loads_nothing_that_must_be_patched_first() -> None:
    program = "import sys, amqtask.pool; print([n for n in ('threading', 'socket', 'pika', 'ssl') if n in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, cwd=root)

    assert done.stdout.strip() == "[]"


def test_def_tasks_have_other_limits_than_coroutines_in_the_asyncio_pool() -> None:
    pool = find_pool("asyncio")

    assert limits_of(pool, is_async=True) == {"soft", "hard"}
    assert limits_of(pool, is_async=False) == {"hard"}
    assert limits_of(find_pool("threads"), is_async=True) == frozenset()


@pytest.mark.parametrize("name", ["eventlet", "gevent"])
def test_a_green_pool_in_a_program_that_is_not_patched_is_an_error_that_says_how(name: str) -> None:
    program = (
        "from amqtask import AmqTask\n"
        "app = AmqTask('unpatched', broker='memory://')\n"
        f"raise SystemExit(app.worker_main(argv=['-P', {name!r}]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode != 0
    assert f"`amqtask worker -P {name}`, or begin your program with `" in done.stderr
