"""Folders that hold other RabbitMQ versions, for `--root` of the commands here; needs root, debootstrap and Debian's packages.

    python -m integration.roots DIR VERSION …        (VERSION: 3.10, 4.0, 4.3)

makes DIR/VERSION, a small Debian of the release that has this version, from the mirror that this machine's apt uses.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from integration.machine import NodeError, program
from integration.nodes import LIBEXEC, within

# Which Debian release has it, and which script of debootstrap knows how to make that (the release itself may be too new).
RELEASES = {"3.10": ("bookworm", "sid"), "4.0": ("trixie", "sid"), "4.3": ("forky", "sid")}


def root_of(version: str, folder: Path) -> str:
    """What RabbitNode takes as `root`: "" where the machine's own RabbitMQ has this version. Raises: NodeError."""
    if _installed(Path("/")).startswith(f"{version}."):
        return ""
    return str(rabbit_root(version, folder))


def rabbit_root(version: str, folder: Path) -> Path:
    """A Debian with that RabbitMQ, whatever the machine has. Raises: NodeError."""
    root = folder / version
    if not _installed(root).startswith(f"{version}."):
        _make(version, root)
    return root


def python_root(folder: Path) -> Path:
    """A Debian with Python 3.13 and pip, as the image of the Dockerfile begins. Raises: NodeError."""
    return _trixie(folder / "python", "python3-venv", "python3-pip", "python-is-python3", "ca-certificates")


def docker_root(folder: Path) -> Path:
    """A Debian with a Docker engine, `docker build` and `docker compose`, and what gives it a network. Raises: NodeError."""
    docker = ("docker.io", "docker-cli", "docker-buildx", "docker-compose")
    return _trixie(folder / "docker", *docker, "iptables", "iproute2", "slirp4netns", "ca-certificates")


def _trixie(root: Path, *packages: str) -> Path:
    """It has its name when it is whole."""
    if not root.exists():
        if os.geteuid() != 0:
            raise NodeError(f"there is no {root}, and only root can make it")
        print(f"installing {', '.join(packages)} of Debian trixie into {root} …", file=sys.stderr, flush=True)
        making = root.with_name(f"{root.name}.part")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        script = Path("/usr/share/debootstrap/scripts/sid")
        debootstrap = program("debootstrap", "debootstrap")
        included = f"--include={','.join(packages)}"
        _run(debootstrap, "--variant=minbase", included, "trixie", str(making), _mirror(), str(script))
        making.rename(root)
    return root


def _installed(root: Path) -> str:
    servers = sorted((root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*"))
    return servers[-1].name.partition("-")[2] if servers else ""


def _make(version: str, root: Path) -> None:
    if os.geteuid() != 0:
        raise NodeError(f"RabbitMQ {version} is not in {root}, and only root can put it there")
    release, script = RELEASES[version]
    print(f"installing RabbitMQ {version} of Debian {release} into {root} …", file=sys.stderr, flush=True)
    shutil.rmtree(root, ignore_errors=True)  # of an attempt that failed
    root.mkdir(parents=True)
    debootstrap = program("debootstrap", "debootstrap")
    known = Path("/usr/share/debootstrap/scripts") / script
    _run(debootstrap, "--variant=minbase", release, str(root), _mirror(), str(known))
    shutil.copy("/etc/hosts", root / "etc/hosts")  # else a node's name does not resolve
    # A mirror may be a snapshot, older than a release in the making says that it may be.
    _run(*within(root), "apt-get", "-qq", "-o", "Acquire::Check-Valid-Until=false", "update")
    # Without an init system the package's last step, starting the server, may fail: that is none of our business.
    install = [*within(root), "apt-get", "-qq", "install", "-y", "--no-install-recommends", "rabbitmq-server"]
    subprocess.run(install, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if not (root / LIBEXEC / "rabbitmq-server").exists():
        raise NodeError(f"rabbitmq-server was not installed in {root}; try: {' '.join(install)}")
    if not _installed(root).startswith(f"{version}."):
        raise NodeError(f"Debian {release} has RabbitMQ {_installed(root)} by now, not {version}")


def _mirror() -> str:
    """Where this machine gets Debian's packages from."""
    fields = ["--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian"]
    found = subprocess.run(["apt-get", "indextargets", *fields], capture_output=True, text=True, check=False)
    if not found.stdout:
        raise NodeError("apt knows no mirror of Debian; is this Debian, and was `apt-get update` run?")
    return found.stdout.splitlines()[0]


def _run(*command: str) -> None:
    done = subprocess.run(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise NodeError(f"{' '.join(command)}: {done.stdout[-2000:]}")


def _environment() -> dict[str, str]:
    return {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


def main() -> int:
    """Make them; print where each is."""
    parser = argparse.ArgumentParser(prog="python -m integration.roots")
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="+", choices=sorted(RELEASES))
    options = parser.parse_args()
    try:
        for version in options.versions:
            print(version, root_of(version, options.folder.resolve()) or "/", flush=True)
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
