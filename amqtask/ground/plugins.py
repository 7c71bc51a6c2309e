"""What lower rows need of upper ones: who asks neither imports nor names what stands above.

`amqtask.plugin_table` answers, and is imported when it is first asked. The package's root says, as it is imported, where that is:
this module is a part of every `import amqtask`, so that the contract stands in another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from amqtask.ground.plugin_contract import Plugins

_sources: list[Callable[[], Plugins]] = []


def register(source: Callable[[], Plugins]) -> None:
    """Say where the answers are."""
    _sources[:] = [source]


def plugins() -> Plugins:
    """Those who answer."""
    return _sources[0]()
