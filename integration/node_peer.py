"""Node with the packages that programs made for it need, installed on first use."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from integration.machine import NodeError
from integration.workers import ROOT

FOLDER = ROOT / ".venv-node"
PACKAGES = ("amqplib@2.3.1", "typescript@5.9.3", "@types/node@20", "@asyncapi/specs@6.11.1")


def modules() -> Path:
    """The folder `node_modules`. Raises: NodeError where Node is not installed."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise NodeError("Node is not installed: apt-get install nodejs npm")
    installed = FOLDER / ".installed"
    if not installed.exists() or installed.read_text() != " ".join(PACKAGES):
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "package.json").write_text('{"private": true}')
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES], cwd=FOLDER, check=True
        )
        installed.write_text(" ".join(PACKAGES))
    return FOLDER / "node_modules"


def run(folder: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`node PROGRAM WORDS`, in a folder of its own with these packages."""
    return subprocess.run(
        ["node", program, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
