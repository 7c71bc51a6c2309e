"""axe (https://github.com/dequelabs/axe-core): what on a page keeps people from using it, by the WCAG's rules."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration.machine import NodeError

if TYPE_CHECKING:
    from integration.chromium import Browser

# The newest of this major version; it is only for tests, and not in the package.
PACKAGE = "axe-core@4"
SERIOUS = ("serious", "critical")
_RUN = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then(
  (found) => done(found.violations.map((one) => [one.impact, one.id, one.help, one.nodes.map((node) => node.html).slice(0, 3)])),
  (error) => done([["critical", "axe", String(error), []]]));
"""


@cache
def source() -> str:
    """The script, from the package registry. Raises: NodeError."""
    npm = shutil.which("npm")
    if npm is None:
        raise NodeError("npm is not installed: apt-get install npm")
    with tempfile.TemporaryDirectory(prefix="amqtask-axe-") as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        packed = next(Path(folder).glob("axe-core-*.tgz"), None)
        if packed is None:
            raise NodeError(f"axe-core cannot be fetched: {done.stderr[-500:]}")
        with tarfile.open(packed) as archive:
            script = archive.extractfile("package/axe.min.js")
            assert script is not None
            return script.read().decode()


def faults(browser: Browser) -> list[Any]:
    """The serious and critical faults of the page that is open: (impact, rule, what it says, elements)."""
    browser.run(source())
    found: list[Any] = browser.run_later(_RUN)
    return [one for one in found if one[0] in SERIOUS]
