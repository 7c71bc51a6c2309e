"""A virtual environment of their own for the systems we compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-bench"
PACKAGES = (
    "celery==5.7.0", "eventlet", "gevent", "dramatiq[rabbitmq]>=2.2,<3", "taskiq>=0.13,<0.14",
    "taskiq-aio-pika>=0.6,<0.7", "pika", "redis", "packaging",
)  # fmt: skip


def python() -> str:
    """The peers' interpreter, installed on first use."""
    interpreter = FOLDER / "bin" / "python"
    if not (FOLDER / ".installed-3").exists():
        print("installing Celery, Dramatiq and Taskiq into .venv-bench …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        pip = [str(interpreter), "-m", "pip", "-q", "--disable-pip-version-check", "install", *PACKAGES]
        subprocess.run(pip, check=True)
        (FOLDER / ".installed-3").touch()
    return str(interpreter)


def versions() -> dict[str, str]:
    """Package → version, for the table."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({n: m.version(n) for n in ('celery','dramatiq','taskiq','taskiq-aio-pika')}))"
    )
    done = subprocess.run([python(), "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
