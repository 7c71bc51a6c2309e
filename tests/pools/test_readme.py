"""The pool in pools/README.md keeps the contract."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from amqtask.pool import Pool
from amqtask.testing.suites.pool import PoolSuite

README = Path(__file__).parents[2] / "pools" / "README.md"


class TestPoolOfTheReadme(PoolSuite):
    @pytest.fixture
    def pool_class(self) -> type[Pool]:
        [program] = re.findall(r"```python\n(import os\nimport threading.*?)```", README.read_text(), re.DOTALL)
        names: dict[str, Any] = {}
        exec(compile(program, str(README), "exec"), names)
        pool: type[Pool] = names["OneThreadPool"]
        return pool
