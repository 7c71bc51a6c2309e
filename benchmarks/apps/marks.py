"""Time marks that tasks leave in a folder (BENCH_MARKS), whichever process or system they run in."""

import os
import time


def mark(name: str) -> None:
    """Leave the present time under `name`; the file appears whole or not at all."""
    path = os.path.join(os.environ["BENCH_MARKS"], name)
    with open(f"{path}.part", "w") as file:
        file.write(repr(time.time()))
    os.replace(f"{path}.part", path)
