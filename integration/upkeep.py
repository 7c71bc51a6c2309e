"""What `make check` asks of others: known faults of what is installed, public names that are not as the last release had them.

python -m integration.upkeep
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """The exit code: 1 when something is to be done."""
    to_do = [*vulnerable(), *broken(ROOT, "amqtask", public_names(ROOT))]
    for line in to_do:
        print(line, file=sys.stderr)
    return 1 if to_do else 0


def vulnerable(*options: str) -> Iterator[str]:
    """Installed versions with a known vulnerability that another version has not. Who cannot ask says so, and finds none."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "-s",
        "osv",
        "-f",
        "json",
        "--progress-spinner",
        "off",
        "--skip-editable",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"pip-audit: not asked, for {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
        return
    for package in packages:
        for fault in package.get("vulns", ()):
            if fault["fix_versions"]:
                yield f"{package['name']} {package['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions'])}"


def public_names(repository: Path) -> list[str]:
    """What docs/api.md has."""
    return re.findall(r"^::: ([\w.]+)$", (repository / "docs" / "api.md").read_text(), re.MULTILINE)


def broken(repository: Path, package: str, public: list[str]) -> Iterator[str]:
    """What of the public names a caller of the last tag's would miss, and CHANGELOG.md does not name as changed or removed."""
    git = ["git", "-C", str(repository), "describe", "--tags", "--abbrev=0", "--match", "v*"]
    tag = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if not tag:
        print("griffe: no tag yet, so there is no release to compare with")
        return
    unreleased = (repository / "CHANGELOG.md").read_text().partition("## [Unreleased]")[2].partition("\n## ")[0]
    # Elsewhere a name may stand for any reason.
    told = "".join(part for part in unreleased.split("\n### ") if part.startswith(("Changed\n", "Removed\n")))
    before = griffe.load_git(package, ref=tag, repo=repository, resolve_aliases=False)
    now = griffe.load(package, search_paths=[repository], try_relative_path=False, resolve_aliases=False)
    for breakage in griffe.find_breaking_changes(before, now):
        name = breakage.obj.path
        if any(f"{name}.".startswith(f"{each}.") for each in public) and f"`{breakage.obj.name}" not in told:
            yield f"{name}: {breakage.kind.value}, since {tag}; CHANGELOG.md names it under neither Changed nor Removed"


if __name__ == "__main__":
    sys.exit(main())
