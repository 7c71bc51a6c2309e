"""The memory commands memsample, memdump and objgraph, in the form of Celery's answers (celery/utils/debug.py)."""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
from collections.abc import Sequence

from amqtask.exceptions import ConfigurationError

_UNITS = ((2**40, "TB"), (2**30, "GB"), (2**20, "MB"), (2**10, "KB"))


def resident_memory() -> str:
    """The resident memory of this process as text; where that is not available, the most that it ever had."""
    return humanized(_resident_bytes())


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        pass  # not Linux
    try:
        import psutil
    except ImportError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(psutil.Process().memory_info().rss)


def humanized(size: int) -> str:
    """Bytes as `12.3MB`."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.5g}{name}"
    return f"{size}b"


def dump_samples(samples: Sequence[str], limit: int) -> str:
    """At most `limit` of the samples, evenly taken, and the memory in use after a garbage collection."""
    kept = list(samples)
    if len(kept) > limit > 0:
        kept = [kept[index * len(kept) // limit] for index in range(limit)]
    gc.collect()
    lines = ["- rss (sample):", *(f"-    > {sample}," for sample in kept)] if kept else []
    return "\n".join([*lines, f"- rss (end): {resident_memory()}.", ""])


def draw_references(type_name: str, *, limit: int, depth: int) -> str:
    """Draw the references to objects of a type into a PNG file; its name. The worker waits meanwhile.

    Raises: ConfigurationError when objgraph is not installed.
    """
    try:
        import objgraph
    except ImportError as error:
        raise ConfigurationError("objgraph is not installed on the worker: pip install objgraph") from error
    objects = objgraph.by_type(type_name)[:limit]
    with tempfile.NamedTemporaryFile(prefix="cobjg", suffix=".png", delete=False) as file:
        objgraph.show_backrefs(
            objects, max_depth=depth, highlight=lambda candidate: candidate in objects, filename=file.name
        )
        return file.name
