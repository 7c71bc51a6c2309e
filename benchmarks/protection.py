"""What signing and encryption cost a message, in microseconds: `python -m benchmarks.protection` prints a table.

Each figure is the best of some rounds, of the whole way from arguments to the body that goes to the broker, or back.
"""

from __future__ import annotations

import base64
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from amqtask import AmqTask
from amqtask.protocol.serialization import AUTH, ENCRYPTED, JSON, dumps, loads
from integration.signers import Signers

SIZES = {"200 B": 200, "10 kB": 10_000, "1 MB": 1_000_000}
ROUNDS, SECONDS = 7, 0.15
HEADERS = {"task": "shop.charge", "id": "5f0d1d1e-6a52-4a0b-9a3b-0c2f6d2a7f11"}
WAYS = (("json", JSON), ("auth", AUTH), ("encrypted", ENCRYPTED))


def microseconds(work: Callable[[], object]) -> float:
    """Of one call."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        calls, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < SECONDS:
            work()
            calls += 1
        best = min(best, took / calls)
    return best * 1e6


def rows() -> list[tuple[str, list[float]]]:
    """What is done, and how long for each size."""
    found = []
    for name, content_type in WAYS:
        write, read = [], []
        for size in SIZES.values():
            value = [["x" * size], {}, None]
            body, _, encoding = dumps(value, name, HEADERS)
            write.append(microseconds(lambda name=name, value=value: dumps(value, name, HEADERS)))  # type: ignore[misc]
            read.append(
                microseconds(
                    lambda body=body, kind=content_type, encoding=encoding: loads(  # type: ignore[misc]
                        body, kind, encoding, frozenset({kind}), HEADERS
                    )
                )
            )
        found += [(f"`{name}`: write", write), (f"`{name}`: read", read)]
    return found


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        signers = Signers(Path(folder))
        signers.add("bench")
        app = AmqTask("bench", set_as_current=False)
        app.conf.update(signers.settings("bench"), encryption_keys={"k": base64.b64encode(os.urandom(32)).decode()})
        app.setup_security()
        print(f"| | {' | '.join(SIZES)} |\n|{' --- |' * (len(SIZES) + 1)}")
        for what, times in rows():
            print(
                f"| {what} | {' | '.join(f'{figure:,.0f}' if figure >= 10 else f'{figure:.1f}' for figure in times)} |"
            )


if __name__ == "__main__":
    main()
