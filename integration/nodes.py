"""Private RabbitMQ nodes on free ports; also a command that runs another one with a broker at hand.

    python -m integration.nodes run [--broker redis] [--redis] [--postgres] -- COMMAND …

uses, in this order, AMQTASK_BROKER_URL, a broker on 127.0.0.1:5672, or a private node that it starts and stops;
the command finds the URL in AMQTASK_BROKER_URL, with the flags those of a Redis in AMQTASK_REDIS_URL and of a PostgreSQL
database in AMQTASK_POSTGRES_URL (integration.servers). With `--broker redis` the broker is AMQTASK_REDIS_URL or a private Redis,
which has the results, too. Only the standard library is needed, so it runs before anything is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from integration.machine import NodeError, apt_install, free_port, is_running
from integration.servers import postgres, redis_server
from integration.waiting import LONG, Patience, eventually

LOCAL_URL = "amqp://guest:guest@127.0.0.1:5672/"
# Set: the broker is nobody else's, or is to be a new one if no URL is given.
PRIVATE = "AMQTASK_BROKER_IS_PRIVATE"
LIBEXEC = "usr/lib/rabbitmq/bin"
HOWTO = """\
amqtask needs a RabbitMQ broker, and found none:
  * AMQTASK_BROKER_URL is not set,
  * nothing answers AMQP on 127.0.0.1:5672,
  * rabbitmq-server is not installed, and this machine has no apt-get (or you are not root) to install it.

Any one of these helps; then run the same command again:
  macOS      brew install rabbitmq && brew services start rabbitmq
  Docker     docker run --rm -d -p 5672:5672 rabbitmq:4
  Debian     sudo apt-get install rabbitmq-server
  Fedora     sudo dnf install rabbitmq-server && sudo systemctl start rabbitmq-server
  elsewhere  export AMQTASK_BROKER_URL=amqp://user:password@host:5672/vhost
"""


def speaks_amqp(host: str, port: int, timeout: float = 2.0) -> bool:
    """Whether an AMQP 0-9-1 broker answers there (Connection.Start follows the protocol header)."""
    try:
        with socket.create_connection((host, port), timeout=timeout) as sock:
            sock.sendall(b"AMQP\x00\x00\x09\x01")
            return sock.recv(1) == b"\x01"
    except OSError:
        return False


def within(root: Path) -> list[str]:
    """What to put before a command that runs in a chroot. Its /proc and /dev are mounted for this command alone."""
    mounts = 'for each in proc dev; do mount --bind "/$each" "$0/$each" || exit; done; exec chroot "$0" "$@"'
    return ["unshare", "--mount", "sh", "-c", mounts, str(root)]


class RabbitNode:
    """One private RabbitMQ node: no root, no configuration file, everything in a folder of its own.

    `root` is "" for the machine's own installation or the folder of a chroot that holds another version.
    """

    def __init__(self, name: str = "amqtask", *, root: str = "", cookie: str = "AMQTASKCOOKIE") -> None:
        # Seen from inside the chroot the folder has the same path without the root.
        self._root = Path(root).resolve() if root else None
        parent = self._root / "tmp" if self._root else None
        self.folder = Path(tempfile.mkdtemp(prefix="amqtask-rabbit-", dir=parent))
        inside = Path("/") / self.folder.relative_to(self._root) if self._root else self.folder
        self.node = f"{name}-{os.getpid()}-{free_port()}@localhost"
        self.port = free_port()
        self._prefix = within(self._root) if self._root else []
        home = self.folder / "home"
        home.mkdir()
        secret = home / ".erlang.cookie"
        secret.write_text(cookie)
        secret.chmod(0o400)
        (self.folder / "plugins").write_text("[].\n")
        self._environment = {
            **os.environ,
            "HOME": str(inside / "home"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(inside / "mnesia"),
            "RABBITMQ_LOG_BASE": str(inside / "log"),
            "RABBITMQ_PID_FILE": str(inside / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(inside / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(inside / "rabbitmq"),
            # Two schedulers and no busy waiting: a test node shares the machine with what it tests.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    @property
    def url(self) -> str:
        """The AMQP URL of the default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def configure(self, text: str) -> None:
        """Lines of rabbitmq.conf, before `start`."""
        with (self.folder / "rabbitmq.conf").open("a") as file:
            file.write(text.rstrip() + "\n")

    def enable(self, *plugins: str) -> None:
        """Plugins, before `start`."""
        (self.folder / "plugins").write_text(f"[{','.join(plugins)}].\n")

    def start(self, timeout: float = 2 * LONG) -> RabbitNode:
        """Start (again) and return once it answers AMQP."""
        self.launch()
        return self.await_start(timeout)

    def launch(self) -> None:
        """Start (again), and do not wait for it."""
        subprocess.run(
            [*self._prefix, f"/{LIBEXEC}/rabbitmq-server", "-detached"], env=self._environment, check=True, cwd="/"
        )

    def await_start(self, timeout: float = 2 * LONG) -> RabbitNode:
        """Return once it answers AMQP."""
        patience = Patience(timeout)
        while not speaks_amqp("127.0.0.1", self.port):
            if patience.is_over:
                raise NodeError(f"{self.node} did not start within {timeout:g} s\n{self.log_tail()}")
            patience.pause(0.1)
        return self

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl; raises NodeError with what it printed when it fails."""
        command = [*self._prefix, f"/{LIBEXEC}/rabbitmqctl", "-q", "-n", self.node, *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NodeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add_vhost(self, name: str) -> str:
        """A new virtual host that guest may use; its URL."""
        self.ctl("add_vhost", name)
        self.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        return f"{self.url}{name}"

    def settle(self) -> None:
        """Have it write down at once which quorum queues it has: by itself it does half a second after the last declaration.

        A queue that a kill finds unwritten is there again after the start, empty, and never gets a leader (RabbitMQ 3.10).
        """
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    @property
    def pid(self) -> int | None:
        """The Erlang virtual machine's process id while it runs."""
        try:
            return int((self.folder / "pid").read_text())
        except (OSError, ValueError):
            return None

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: its connections stay and it says nothing, until `resume`."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on; also when it was never paused."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """An orderly stop; `start` brings it back with its data."""
        pid = self.pid
        try:
            self.ctl("stop")
        except NodeError:
            self._end(signal.SIGKILL)
            return
        # The file with the number is gone before the process is, and while it lasts no other begins in its place.
        if pid is not None:
            self._await_end(pid)

    def remove(self) -> None:
        """Kill it and delete its folder."""
        self.kill()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(logs[0].read_text(errors="replace").splitlines()[-lines:]) if logs else "(no log)"

    def _send(self, signum: int) -> None:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _end(self, signum: int) -> None:
        pid = self.pid
        if pid is None:
            return
        self._send(signum)
        self._await_end(pid)

    def _await_end(self, pid: int) -> None:
        eventually(lambda: not is_running(pid), what=f"{self.node} does not end")
        # Later the number is another process's.
        (self.folder / "pid").unlink(missing_ok=True)


DISCOVERY = "cluster_formation.peer_discovery_backend = classic_config"
PEERS = "cluster_formation.classic_config.nodes"


class Cluster:
    """Private nodes that are one broker, on 127.0.0.1; a context manager that starts and removes them.

    The minority of a partition stops serving, and joins again by itself (pause_minority). Its nodes are hurt one by one (`kill`,
    `pause`, `stop`, and `isolate` here); `mend` makes all of them run together again.
    """

    def __init__(self, size: int = 3, *, root: str = "") -> None:
        self.nodes = [RabbitNode(f"amqtask{number}", root=root) for number in range(size)]
        first = self.nodes[0].node
        # The first begins alone: RabbitMQ 4 waits a while for nodes that it is told of. The others join it on their first start.
        for each in self.nodes:
            each.configure("cluster_partition_handling = pause_minority")
        for each in self.nodes[1:]:
            each.configure(f"{DISCOVERY}\n{PEERS}.1 = {first}\n{PEERS}.2 = {each.node}")
        self._isolated: list[RabbitNode] = []

    def __enter__(self) -> Cluster:
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def urls(self) -> list[str]:
        """The AMQP URL of each node."""
        return [each.url for each in self.nodes]

    @property
    def url(self) -> str:
        """All of them, as `broker_url` takes several."""
        return ";".join(self.urls)

    def start(self) -> Cluster:
        """The first node, then the others, which join it; return once all are one."""
        self.nodes[0].start()
        for each in self.nodes[1:]:
            each.launch()
        for each in self.nodes[1:]:
            each.await_start()
        self.await_whole()
        return self

    def mend(self) -> None:
        """Whatever was done to its nodes: all run again, as one."""
        for each in self.nodes:
            each.resume()
        missing = [each for each in self.nodes if each.pid is None]
        for each in missing:
            each.launch()
        for each in missing:
            each.await_start()
        self.heal()
        self.await_whole()

    def await_whole(self) -> None:
        """Return once they see each other."""
        eventually(lambda: len(self.running()) == len(self.nodes), 2 * LONG, what="no cluster", every=0.5)

    def running(self) -> list[str]:
        """The nodes that the first one that answers sees at work."""
        with contextlib.suppress(NodeError):
            found = json.loads(self.alive().ctl("cluster_status", "--formatter", "json"))
            return [str(name) for name in found["running_nodes"]]
        return []

    def leader_of(self, queue: str, vhost: str = "/") -> RabbitNode:
        """The node that leads a quorum queue, or holds a classic one. Raises: NodeError."""
        for line in self.alive().ctl("list_queues", "-p", vhost, "name", "leader", "pid").splitlines():
            name, _, place = line.partition("\t")
            if name == queue:
                return next(each for each in self.nodes if each.node in place)
        raise NodeError(f"there is no queue {queue!r} in {vhost!r}")

    def alive(self, *but: RabbitNode) -> RabbitNode:
        """A node that runs, none of those; one that is paused counts as running."""
        return next(each for each in self.nodes if each.pid is not None and each not in but)

    def others(self, node: RabbitNode) -> list[RabbitNode]:
        """All but that one."""
        return [each for each in self.nodes if each is not node]

    def isolate(self, node: RabbitNode) -> None:
        """Cut it off from the other nodes, not from clients, until `heal`: it refuses their cookie, and they its own."""
        self._isolated.append(node)
        # Both at once: a node that sees only one of two others go makes everybody part with everybody (OTP 25's `global`).
        refuse = "[erlang:set_cookie(Node, wrong) || Node <- Others], [erlang:disconnect_node(Node) || Node <- Others]"
        node.ctl("eval", f"Others = {self._names(self.others(node))}, {refuse}.")

    def heal(self) -> None:
        """End each isolation."""
        for node in self._isolated:
            others = self._names(self.others(node))
            # Where nobody calls another node (RabbitMQ 4.3), they would not connect again by themselves.
            again = "erlang:set_cookie(Node, erlang:get_cookie()), net_kernel:connect_node(Node)"
            node.ctl("eval", f"[begin {again} end || Node <- {others}].")
        self._isolated.clear()

    def _names(self, nodes: Sequence[RabbitNode]) -> str:
        return "[" + ", ".join(f"'{each.node}'" for each in nodes) + "]"

    def remove(self) -> None:
        """Kill all nodes and delete their folders."""
        for each in self.nodes:
            each.remove()


def rabbitmq_installed() -> bool:
    """Whether the machine has a rabbitmq-server of its own."""
    return (Path("/") / LIBEXEC / "rabbitmq-server").exists()


def install_rabbitmq() -> None:
    """See that the machine has a rabbitmq-server. Raises: NodeError."""
    if not rabbitmq_installed() and not apt_install("rabbitmq-server"):
        raise NodeError(HOWTO)


def given_broker() -> str | None:
    """The URL of a broker that is there already; with AMQTASK_BROKER_IS_PRIVATE only the one that the environment names."""
    configured = os.environ.get("AMQTASK_BROKER_URL")
    if configured or PRIVATE in os.environ:
        return configured
    return LOCAL_URL if speaks_amqp("127.0.0.1", 5672) else None


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """The URL of a broker that is there while the block runs."""
    given = given_broker()
    if given:
        yield given
        return
    install_rabbitmq()
    node = RabbitNode()
    print("starting a private RabbitMQ node …", file=sys.stderr, flush=True)
    try:
        yield node.start().url
    finally:
        node.remove()


def _with_broker(stack: contextlib.ExitStack, name: str) -> dict[str, str]:
    """What the environment says of a broker that is there until the stack is left."""
    if name == "redis":
        url = stack.enter_context(redis_server())
        told = {"AMQTASK_BROKER_URL": url, "AMQTASK_REDIS_URL": url, "AMQTASK_RESULT_BACKEND": url}
        is_private = url != os.environ.get("AMQTASK_REDIS_URL")
    else:
        url = stack.enter_context(broker())
        told = {"AMQTASK_BROKER_URL": url}
        is_private = url not in (os.environ.get("AMQTASK_BROKER_URL"), LOCAL_URL)
    return {**told, PRIVATE: "1"} if is_private else told


def _run(command: Sequence[str], *, broker_name: str, with_redis: bool, with_postgres: bool) -> int:
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, **_with_broker(stack, broker_name)}
        if with_redis and broker_name != "redis":
            environment["AMQTASK_REDIS_URL"] = stack.enter_context(redis_server())
        if with_postgres:
            environment["AMQTASK_POSTGRES_URL"] = stack.enter_context(postgres()).url
        # Ctrl+C reaches the whole foreground group; the command decides how it ends, and we still clean up.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        process = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )
        terminate = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, previous)
            signal.signal(signal.SIGTERM, terminate)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m integration.nodes")
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("--broker", choices=["rabbitmq", "redis"], default="rabbitmq", help="which broker [rabbitmq]")
    parser.add_argument("--redis", action="store_true", help="a Redis server too (AMQTASK_REDIS_URL)")
    parser.add_argument("--postgres", action="store_true", help="a PostgreSQL database too (AMQTASK_POSTGRES_URL)")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    try:
        return _run(
            options.command, broker_name=options.broker, with_redis=options.redis, with_postgres=options.postgres
        )
    except NodeError as error:
        print(error, file=sys.stderr)
        return 2


__all__ = [
    "PRIVATE",
    "Cluster",
    "NodeError",
    "RabbitNode",
    "apt_install",
    "broker",
    "free_port",
    "given_broker",
    "install_rabbitmq",
    "rabbitmq_installed",
    "speaks_amqp",
]

if __name__ == "__main__":
    sys.exit(main())
