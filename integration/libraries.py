"""Test suites of libraries on top of Celery, under Celery and then under amqtask: `python -m integration.libraries [NAME…]`.

Each library is fetched by name and version into a folder that goes when all is done (`--keep DIR`: stays, and is used again),
and nothing of it is part of this project. Its tests run in an environment with Celery, then in the same one with `celery`
standing for `amqtask` (`integration/standing`). What counts is what passes under Celery: at least 90 % of it must pass here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from integration.workers import ROOT

CELERY = "celery==5.7.0"
OURS = (
    "pika>=1.4.2,<2", "aio-pika>=9.5", "billiard>=4.2.1,<5", "click>=8.1.7", "tomli>=2; python_version < '3.11'",
    "msgspec>=0.20",  # of the extra redis
)  # fmt: skip
LEAST = 0.9
# Seconds for one test: under a system that lacks something a test may wait for ever.
ONE_TEST = 60


@dataclass(frozen=True)
class Library:
    """One on top of Celery; `version` is a release of PyPI's with its tests, or a tag of the repository `git`."""

    name: str
    version: str
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    git: str = ""

    @property
    def source(self) -> str:
        """What pip gets it by."""
        return f"git+{self.git}@{self.version}" if self.git else f"{self.name}=={self.version}"


DJANGO = ("Django>=5.2,<5.3", "pytest>=8,<9", "pytest-django>=4.5.2,<5", "pytest-timeout")
PLAIN = ("pytest>=8,<9", "pytest-timeout")
LIBRARIES = (
    Library("celery-redbeat", "2.4.2", ("tests",), (*PLAIN, "fakeredis>=2.27", "pytz")),
    Library(
        "django-celery-results", "2.6.0", ("t/unit",), (*DJANGO, "pytest-benchmark", "pytz"),
        env={"DJANGO_SETTINGS_MODULE": "t.proj.settings"},
    ),
    Library("django-celery-beat", "2.9.0", ("t/unit",), (*DJANGO, "ephem"), env={"CELERY_BROKER_URL": "memory://"}),
    Library(
        "django-celery-email", "3.0.0", ("tests/tests.py",), DJANGO, env={"DJANGO_SETTINGS_MODULE": "tests.settings"}
    ),
    Library(
        "opentelemetry-instrumentation-celery",
        "0.66b2",
        ("tests",),
        (*PLAIN, "opentelemetry-test-utils==0.66b2", "opentelemetry-sdk"),
    ),
    Library(
        "sentry-sdk",
        "2.68.0",
        ("tests/integrations/celery",),
        (*PLAIN, "kombu", "pytest-forked", "pytest-asyncio", "pytest-localserver", "jsonschema", "werkzeug", "redis"),
        ("--ignore=tests/integrations/celery/integration_tests",),
        git="https://github.com/getsentry/sentry-python",
    ),
    Library("flower", "2.2.0", ("tests/unit",), (*PLAIN, "redis")),
    Library(
        "celery-singleton", "0.3.1", ("tests",), (*PLAIN, "redis", "fakeredis"),
        git="https://github.com/steinitzu/celery-singleton",
    ),
    Library(
        "celery-once", "3.0.0", ("tests",),
        (*PLAIN, "redis", "freezegun", "fakeredis", "mock", "pytest-mock", "flask"),
        # It imports a name that Celery 5 does not have.
        ("--ignore=tests/unit/test_tasks.py",),
        git="https://github.com/cameronmaske/celery-once",
    ),
    Library(
        "asgi-correlation-id", "v4.3.4", ("tests",),
        (*PLAIN, "pytest-asyncio<0.24", "pytest-mock", "pytest-celery<1", "fastapi", "httpx<0.28", "sentry-sdk", "requests"),
        git="https://github.com/snok/asgi-correlation-id",
    ),
    Library(
        "celery-pubsub", "2.0.0-beta3", ("tests",), (*PLAIN, "packaging", "typing-extensions"),
        git="https://github.com/Mulugruntz/celery-pubsub",
    ),
    Library(
        "django-structlog", "9.1.1", ("test_app",),
        (*DJANGO, "structlog", "django-environ", "django-extensions", "colorama", "factory-boy"),
        env={"DJANGO_SETTINGS_MODULE": "config.settings.test", "CELERY_BROKER_URL": "memory://"},
        git="https://github.com/jrobichaud/django-structlog",
    ),
    Library(
        "celery-dyrygent", "v0.8.0", ("tests/unit", "tests/component"), (*PLAIN, "mock"), ("--import-mode=importlib",),
        git="https://github.com/ovh/celery-dyrygent",
    ),
)  # fmt: skip


@dataclass
class Run:
    """What became of the tests of one run: name → passed, failed, skipped."""

    fates: dict[str, str]
    log: Path

    @property
    def passed(self) -> set[str]:
        """Names of those that passed."""
        return {name for name, fate in self.fates.items() if fate == "passed"}


class Bench:
    """A folder with an environment for each library."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, library: Library) -> Path:
        """Fetch and install it; the folder of its source. Raises: CalledProcessError."""
        home = self._folder / library.name
        place = home / "source"
        if not (home / ".prepared").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            _call(sys.executable, "-m", "venv", str(home / "venv"))
            self._fetch(library, place)
            self._pip(library, "install", CELERY, *OURS, *library.needs, str(place))
            (home / ".prepared").touch()
        return place

    def _fetch(self, library: Library, place: Path) -> None:
        if library.git:
            _call("git", "clone", "-q", "--depth", "1", "--branch", library.version, library.git, str(place))
            return
        fetched = place.with_name("fetched")
        self._pip(library, "download", "--no-deps", "--no-binary", library.name, "-d", str(fetched), library.source)
        (archive,) = fetched.iterdir()
        shutil.unpack_archive(archive, fetched, filter="data")
        (unpacked,) = (path for path in fetched.iterdir() if path.is_dir())
        unpacked.rename(place)

    def _pip(self, library: Library, *words: str) -> None:
        _call(str(self._python(library)), "-m", "pip", "-q", "--disable-pip-version-check", *words)

    def _python(self, library: Library) -> Path:
        return self._folder / library.name / "venv" / "bin" / "python"

    def known(self, library: Library, name: str) -> Run | None:
        """What became of an earlier run in a folder that is kept."""
        home = self._folder / library.name
        report = home / f"{name}.xml"
        return Run(dict(_fates(report)), home / f"{name}.log") if report.exists() else None

    def run(self, library: Library, name: str, paths: Sequence[Path]) -> Run:
        """Run its tests with these folders first on the path."""
        home = self._folder / library.name
        report, log = home / f"{name}.xml", home / f"{name}.log"
        report.unlink(missing_ok=True)
        place = home / "source"
        env = {
            **{
                key: value for key, value in os.environ.items() if not key.startswith(("AMQTASK_", "CELERY_", "PYTEST"))
            },
            "PYTHONPATH": os.pathsep.join([*map(str, paths), str(place)]),
            **library.env,
        }
        command = [
            str(self._python(library)), "-m", "pytest", "-q", *library.tests, f"--junitxml={report}", "-o", "junit_family=xunit1",
            "-p", "no:cacheprovider", "-o", "addopts=", f"--timeout={ONE_TEST}", *library.options,
        ]  # fmt: skip
        with log.open("wb") as output:
            subprocess.run(command, cwd=place, env=env, stdout=output, stderr=subprocess.STDOUT, check=False)
        return Run(dict(_fates(report)), log)


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


def _fates(report: Path) -> Iterator[tuple[str, str]]:
    if not report.exists():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {child.tag for child in case}
        yield name, "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="amqtask-libraries-") as folder:
        yield Path(folder)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([library.name for library in LIBRARIES]))
@click.option("--keep", type=click.Path(path_type=Path), help="Keep sources, environments and logs in this folder.")
@click.option("-v", "--verbose", is_flag=True, help="Name the tests that pass under Celery only.")
def main(names: Sequence[str], keep: Path | None, verbose: bool) -> None:
    """Run the test suites of libraries on top of Celery under Celery, then under amqtask."""
    failing = []
    with _folder(keep) as folder:
        bench = Bench(folder)
        for library in (library for library in LIBRARIES if not names or library.name in names):
            share = _try(bench, library, verbose)
            if share is None or share < LEAST:
                failing.append(library.name)
    if failing:
        raise SystemExit(f"below {LEAST:.0%}, or not to be had: {', '.join(failing)}")


def _try(bench: Bench, library: Library, verbose: bool) -> float | None:
    what = f"{library.name} {library.version}"
    try:
        bench.prepare(library)
    except subprocess.CalledProcessError as error:
        click.echo(f"{what:<45} cannot be fetched or installed: {error}")
        return None
    theirs = bench.known(library, "celery") or bench.run(library, "celery", ())
    ours = bench.run(library, "amqtask", (ROOT / "integration" / "standing", ROOT, ROOT / "pools"))
    both = theirs.passed & ours.passed
    share = len(both) / len(theirs.passed) if theirs.passed else 0.0
    click.echo(f"{what:<45} {len(theirs.passed):>4} pass under {CELERY}, {len(both):>4} of them here ({share:.1%})")
    if verbose:
        for name in sorted(theirs.passed - both):
            click.echo(f"    {name} ({ours.fates.get(name, 'not run')})")
    return share


if __name__ == "__main__":
    main()
