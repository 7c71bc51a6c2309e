"""Build the documentation site into build/site: `make docs`, or `python docs/make_site.py`.

The pages are the Markdown files of the project where they lie, so that their links are the same in an editor, in a forge and on
the site. Zensical refuses a link that leads nowhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
FOLDERS = ("", "benchmarks", "deploy", "docs", "examples", "pools")


def main() -> int:
    """Gather the pages, and build. Returns the exit code of Zensical."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for folder in FOLDERS:
        found = (ROOT / folder).glob("*.md" if folder in ("", "docs") else "**/*.md")
        for page in found:
            place = PAGES / page.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            # What marks a block that cannot run alone (tests/test_docs_run.py) is no language.
            place.write_text(page.read_text().replace("```python fragment", "```python"))
    shutil.copytree(ROOT / "docs" / "images", PAGES / "docs" / "images")
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
