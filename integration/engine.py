"""A Docker engine that nobody else uses: Debian's, in namespaces of its own, gone with its images when its block ends.

It needs root, debootstrap and Debian's packages. Its programs are in a folder (integration.roots), its files in another, and its
network (bridges, packet filters, published ports) is not the machine's: packets go out through slirp4netns, which is an ordinary
program to the machine. Nothing is asked of a registry: images are made of folders, and have the names that are wanted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from integration.machine import NodeError, Server
from integration.roots import docker_root

# The first process of the engine's process namespace, in a mount namespace of its own: it makes the root its root.
# Arguments: the root, the folder for images and containers, the folder that is seen under its own name, the cgroups' name.
_ENTER = """
mount --bind "$1" "$1"
mkdir -p "$1/var/lib/docker" "$1$3"
mount --bind "$2" "$1/var/lib/docker"
mount --bind -o ro "$3" "$1$3"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/run"
mount -t tmpfs tmpfs "$1/tmp"
mount --rbind /dev "$1/dev"
cd "$1"
pivot_root . mnt
exec chroot . tini -s -- sh -ec "$5" sh "$4"
"""
# The engine's network namespace has a name before anything is done in it, so that nothing can be done in the machine's instead.
_RUN = """
touch /run/network
unshare --net=/run/network true
nsenter --net=/run/network mount -t sysfs sysfs /sys
mount --rbind /mnt/sys/fs/cgroup /sys/fs/cgroup
slirp4netns --configure --mtu=65520 --disable-host-loopback --netns-type=path /run/network tap0 &
umount -l /mnt
exec nsenter --net=/run/network dockerd --cgroup-parent="/$1"
"""
CGROUPS = Path("/sys/fs/cgroup")
# slirp4netns answers there, and asks the machine's name server.
RESOLVER = "nameserver 10.0.2.3\n"
# Whom the machine trusts an image trusts, too: the way to PyPI may be the machine's own.
_TRUSTED = "etc/ssl/certs/ca-certificates.crt"
# What an image has no use for.
_EMPTIED = ("proc", "sys", "dev", "tmp", "run", "var/cache/apt", "var/lib/apt/lists")


class Engine:
    """The engine, while its block runs. `checkout` has its own name in it, too, and cannot be written there.

    Raises: NodeError where it cannot be started.
    """

    def __init__(self, roots: Path, checkout: Path) -> None:
        self._roots, self._checkout = roots, checkout
        self._stack = contextlib.ExitStack()
        self._bin = Path()
        self._pid = ""
        self.root = Path()

    def __enter__(self) -> Engine:
        if os.geteuid() != 0:
            raise NodeError("a Docker engine needs root")
        self.root = docker_root(self._roots)
        (self.root / "etc/resolv.conf").write_text(RESOLVER)
        with contextlib.ExitStack() as stack:
            # Beside the roots, for a folder of temporary files may be in memory.
            data = Path(tempfile.mkdtemp(prefix="engine-", dir=self._roots))
            stack.callback(shutil.rmtree, data, ignore_errors=True)
            stack.callback(_remove_cgroups, data.name)
            server = Server("docker")
            stack.callback(server.remove)
            self._bin = server.folder / "bin"
            self._start(server, data)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, server: Server, data: Path) -> None:
        arguments = [str(self.root), str(data), str(self._checkout), data.name, _RUN]
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "sh", *arguments]
        server.run(enter, lambda: self._answers(server))

    def _answers(self, server: Server) -> bool:
        if not self._pid:
            self._pid = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().strip()
            if not self._pid:
                return False
            self._write_program()
        return subprocess.run([self._docker, "version"], capture_output=True, check=False).returncode == 0

    def _write_program(self) -> None:
        """`docker`, to be typed outside."""
        own = "PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp"
        inside = f"nsenter --target {self._pid} --mount --pid nsenter --net=/run/network"
        self._bin.mkdir()
        self._docker.write_text(f'#!/bin/sh\nexec {inside} env -C "$PWD" {own} docker "$@"\n')
        self._docker.chmod(0o755)

    @property
    def _docker(self) -> Path:
        return self._bin / "docker"

    @property
    def path(self) -> str:
        """PATH with this engine's `docker` before any other."""
        return f"{self._bin}{os.pathsep}{os.environ['PATH']}"

    def within_network(self, *words: str) -> list[str]:
        """A command of the machine's, for which published ports are on 127.0.0.1."""
        return ["nsenter", f"--net=/proc/{self._pid}/root/run/network", *words]

    def import_image(self, root: Path, name: str, *changes: str) -> None:
        """Make an image of a folder; `changes` are lines of a Dockerfile."""
        told = [word for change in changes for word in ("--change", change)]
        left_out = [*(f"--exclude=./{each}/*" for each in _EMPTIED), f"--exclude=./{_TRUSTED}"]
        paths = ["-C", str(root), ".", "-C", "/", _TRUSTED]
        tar = ["tar", "-c", "--numeric-owner", "--one-file-system", *left_out]
        with subprocess.Popen([*tar, *paths], stdout=subprocess.PIPE) as packing:
            words = [str(self._docker), "import", *told, "-", name]
            done = subprocess.run(words, stdin=packing.stdout, capture_output=True, text=True, check=False)
        if done.returncode or packing.returncode:
            raise NodeError(f"docker import {name}: {done.stderr}")


def _remove_cgroups(name: str) -> None:
    """Those of containers that ended with the engine, not by it; version 1 has a tree for each controller."""
    for top in (*CGROUPS.glob(f"*/{name}"), CGROUPS / name):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
