"""Node names (`celery@host`) and the %-fields that names and file paths may carry."""

from __future__ import annotations

import socket

DEFAULT_NAME = "celery"


def node_name(template: str | None) -> str:
    """A full node name: `%h` host name, `%n` the part before @, `%d` domain, `%%`; without @ the host is added.

    The default name is Celery's (`celery@host`), so that tools which look for it find us.
    """
    host = socket.gethostname()
    name = template or f"{DEFAULT_NAME}@%h"
    if "@" not in name:
        name = f"{name}@%h"
    return expand(name, f"{DEFAULT_NAME}@{host}")


def expand(text: str, node: str, index: str = "") -> str:
    """Replace `%h %n %d %p %i %I %%` in a name or path; `%i`/`%I` are empty in the main process (as in Celery)."""
    name, _, host = node.partition("@")
    _, _, domain = host.partition(".")
    fields = {
        "h": host,
        "n": name,
        "d": domain,
        "p": node,
        "i": index or "0",
        "I": f"-{index}" if index else "",
        "%": "%",
    }
    out: list[str] = []
    position = 0
    while position < len(text):
        if text[position] == "%" and position + 1 < len(text) and text[position + 1] in fields:
            out.append(fields[text[position + 1]])
            position += 2
        else:
            out.append(text[position])
            position += 1
    return "".join(out)
