"""`make release`: everything of a release but its upload, into `dist`.

sdist and wheel are built twice and must be the same bytes; the wheel is installed for each Python there is and runs a task; what
it brings is listed (CycloneDX). The upload is the forge's: .github/workflows/release.yml.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
# What nobody who installs a package wants in it.
FOREIGN = ("tests/", "integration/", "benchmarks/")
TRIED = """
from amqtask import AmqTask
from amqtask.testing.worker import start_worker

app = AmqTask("tried", broker="memory://", backend="cache+memory://")
add = app.task(name="add")(lambda x, y: x + y)
with start_worker(app, pool="threads", concurrency=1):
    print(add.delay(4, 4).get(timeout=30))
"""


class ReleaseError(Exception):
    """What keeps the distributions from being released."""


def main() -> int:
    """Build, compare, try, list. Returns the exit code."""
    moment = run(["git", "log", "-1", "--format=%ct"], ROOT).strip()
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = (build(folder / number, moment) for number in "12")
        if digests(first) != digests(second):
            raise ReleaseError(f"two builds differ: {digests(first)} {digests(second)}")
        shutil.copytree(first, DIST)
        look_at_contents()
        (wheel,) = DIST.glob("*.whl")
        for version in PYTHONS:
            python = shutil.which(f"python{version}")
            if python is None or not works(python):
                print(f"python{version}: not here")
                continue
            print(f"python{version}: a task says {try_out(python, wheel, folder / version)}")
        (DIST / "sbom.json").write_text(bill_of_materials(folder / "sbom", wheel))
    for line in digests(DIST):
        print(line)
    return 0


def build(folder: Path, moment: str) -> Path:
    """Build from what is committed, and nothing else. Returns the folder with sdist and wheel."""
    source, built = folder / "source", folder / "dist"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(source, filter="data")
    run([sys.executable, "-m", "build", "--outdir", str(built), "."], source, SOURCE_DATE_EPOCH=moment)
    for sdist in built.glob("*.tar.gz"):
        settle(sdist, int(moment))
    return built


def settle(sdist: Path, moment: int) -> None:
    """Give all that is in an sdist one time and no owner: setuptools keeps those of the machine that built it."""
    packed = io.BytesIO()
    with tarfile.open(sdist) as tar, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as settled:
        for member in sorted(tar.getmembers(), key=lambda found: found.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.pax_headers = {}
            settled.addfile(member, tar.extractfile(member) if member.isfile() else None)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=moment) as compressed:
        compressed.write(packed.getvalue())


def look_at_contents() -> None:
    """Raises: ReleaseError for a distribution with what does not belong into it."""
    names: list[str] = []
    for wheel in DIST.glob("*.whl"):
        names += zipfile.ZipFile(wheel).namelist()
    for sdist in DIST.glob("*.tar.gz"):
        with tarfile.open(sdist) as tar:
            names += [member.partition("/")[2] for member in tar.getnames()]
    foreign = [name for name in names if name.startswith(FOREIGN)]
    if foreign:
        raise ReleaseError(f"these do not belong into a distribution: {', '.join(foreign[:5])}")
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir())], ROOT)


def try_out(python: str, wheel: Path, folder: Path) -> str:
    """Install the wheel alone, as a user would, and run a task. Returns what the task said."""
    environment = environment_of(python, folder, str(wheel))
    run([str(environment / "amqtask"), "--version"], folder)
    return run([str(environment / "python"), "-c", TRIED], folder).strip()


def bill_of_materials(folder: Path, wheel: Path) -> str:
    """The SBOM (CycloneDX, JSON) of the package with all that its extras bring."""
    environment = environment_of(sys.executable, folder, f"{wheel}[all]")
    return run(
        [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", str(environment / "python")],
        ROOT,
    )


def environment_of(python: str, folder: Path, *packages: str) -> Path:
    """A new virtual environment with these packages. Returns the folder of its programs."""
    run([python, "-m", "venv", str(folder)], ROOT)
    run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages], ROOT)
    return folder / "bin"


def works(python: str) -> bool:
    """A program of that name may be one that only says that the version is not installed."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def digests(folder: Path) -> list[str]:
    """Name and SHA-256 of each file."""
    return [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(folder.iterdir())]


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a program prints. Raises: ReleaseError."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReleaseError as error:
        sys.exit(f"release: {error}")
