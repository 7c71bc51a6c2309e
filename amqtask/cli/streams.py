"""Standard input, output and error as commands need them, whatever started the process."""

from __future__ import annotations

import io
import os
import sys


def make_usable() -> None:
    """A stream that is closed (`2>&-`) becomes the null device: its number would be the next socket's, and every print an error.
    What the terminal's encoding has no character for is printed as an escape."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which may be this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null_stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 - until the process ends
            setattr(sys, name, null_stream)
            setattr(sys, f"__{name}__", null_stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
