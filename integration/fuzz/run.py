"""One pool's run: a live worker, hostile messages with good ones between them, and what came of each."""

from __future__ import annotations

import http.client
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from amqtask import AmqTask, chord, group
from integration.fuzz.amqp import RawMessage, Refused
from integration.fuzz.corpus import CHORDS, QUEUE, REPLIES, Hostile, batches
from integration.fuzz.grounds import Connection, Ground, RabbitGround, RedisGround
from integration.fuzz.mutations import NODE
from integration.nodes import RabbitNode, free_port
from integration.waiting import LONG, PATIENT, NeverHappened, eventually
from integration.workers import WorkerProcess

APP = "integration.apps.fuzzed"
BATCH, GOOD_EVERY = 40, 4
QUIET = 4.0
# Let glibc give back what is freed: what it keeps by itself (up to 100 MB of what large bodies needed) would hide a leak.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
MOST_GROWTH, LONGEST_LINE = 50 << 20, 8_192
# Everything of Unicode that moves the cursor, turns the direction or ends a line; a log line ends by \n alone.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_TROUBLE = re.compile(r"^Traceback|internal error|goes back to|could not be moved")
_LOST = re.compile(
    r"Trying to re-establish|connection lost|Connection to broker lost|connection to Redis at .* was lost"
)
_LIMITED = re.compile(r"\[(fz-\d+)\] raised unexpected: (?:Soft)?TimeLimitExceeded")
_TAG = re.compile(r"(?:fz|good)-\d+")


@dataclass(slots=True)
class Report:
    """What came of one run."""

    pool: str
    seed: int
    hostile: int = 0
    good: int = 0
    ran: int = 0
    dead: int = 0
    dropped: int = 0
    delayed: int = 0
    refused: int = 0
    doubled: int = 0
    growth: int = 0
    longest_line: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    COLUMNS = (
        "pool", "seed", "hostile", "good", "ran", "dead-lettered", "expired", "still delayed", "refused by the broker",
        "copied twice", "memory", "longest line", "seconds", "failures",
    )  # fmt: skip
    HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"

    def __str__(self) -> str:
        counts = (
            self.hostile, self.good, self.ran, self.dead, self.dropped, self.delayed, self.refused, self.doubled,
        )  # fmt: skip
        cells = (
            self.pool, self.seed, *(f"{count:,}" for count in counts), f"{self.growth / (1 << 20):+.0f} MB",
            f"{self.longest_line:,} B", f"{self.seconds:.0f}", len(self.failures),
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


class Fuzzing:
    """One worker; without a RabbitMQ node, on a Redis of its own."""

    def __init__(
        self, node: RabbitNode | None, pool: str, messages: Sequence[Hostile], *, seed: int, singly: bool = False
    ) -> None:
        self.messages, self.singly = messages, singly
        self.report = Report(pool, seed, hostile=len(messages))
        self.ground: Ground = RedisGround(seed) if node is None else RabbitGround(node, f"fuzz-{pool}-{free_port()}")
        self.url = self.ground.url
        self.notes = Path(tempfile.mkstemp(prefix="amqtask-fuzz-")[1])
        self.port = free_port()
        self.worker = WorkerProcess(
            APP, "-P", pool, "-c", "4", "-n", NODE, "-E", "--health-port", str(self.port),
            environment={
                "FUZZ_NOTES": str(self.notes), "FUZZ_QUEUE": QUEUE, "FUZZ_BACKEND": self.ground.backend,
                "AMQTASK_BROKER_URL": self.url, **MALLOC,
            },
        )  # fmt: skip
        self.client = AmqTask("client", broker=self.url, backend=self.ground.backend, **PATIENT)
        # Sent, and by whom the broker's word is known: hostile numbers that it refused, and those it may not have taken.
        self._refused: set[int] = set()
        self._uncertain: set[int] = set()
        self._good_sent = 0
        # Rounds of waiting in which nothing moved although the work queue is not empty.
        self._idle_for = 0

    def run(self) -> Report:
        """Send everything, wait until all is quiet, look at what came of it."""
        began = time.monotonic()
        with self.worker.start():
            try:
                self._run()
            except Exception as error:
                self._fail(f"the run itself: {error!r}")
            finally:
                self.client.close()
                self._stop()
            try:
                self._account()  # only now does no worker hold what is delayed
            finally:
                self._look_at_log()
        self.report.seconds = time.monotonic() - began
        self.notes.unlink()
        self.ground.remove()
        return self.report

    def _run(self) -> None:
        self._good_results("before", 20)
        with self.ground.connect() as connection:
            connection.declare(CHORDS, {"x-queue-type": "classic", "x-expires": 3_600_000})
        memory, connections = self._memory(), self._connections()
        self._send()
        self._wait()
        self.report.growth = self._memory() - memory
        if self.report.growth > MOST_GROWTH:
            self._fail(f"the main process grew by {self.report.growth >> 20} MB")
        lost = connections - self._connections()
        if lost:
            self._fail(f"{len(lost)} of {len(connections)} connections are gone: {', '.join(sorted(lost))}")
        self._look_alive()
        self._good_results("after", 20)

    def _fail(self, text: str) -> None:
        self.report.failures.append(text)
        if self.singly:
            print(f"  - {text}", flush=True)

    # -- sending

    def _send(self) -> None:
        connection = self.ground.connect()
        for batch in batches(self.messages, 1 if self.singly else BATCH):
            if self.worker.process.poll() is not None:
                self._died(batch)
            raw = [self._addressed(message) for message in batch]
            mixed = list(self._mixed(raw))
            try:
                connection.publish(mixed)
            except Refused as error:
                self._note_refusal(batch, error)
                connection.close()
                connection = self.ground.connect()
                continue
            if self.singly:
                connection.publish([self._good()])
                self._watch(batch[0])
        connection.close()

    def _watch(self, message: Hostile) -> None:
        """Wait for the good task after a message; what is logged until then is told of that message."""
        offset = self.worker.log_path.stat().st_size
        wanted = f'good-{self._good_sent - 1}"'
        with suppress(NeverHappened):
            eventually(
                lambda: wanted in self.notes.read_text()[-2000:] or self.worker.process.poll() is not None,
                5,
                every=0.005,
            )
        said = self.worker.log_path.read_bytes()[offset:]
        for pattern in (_LOST, _CONTROL, _TROUBLE):
            found = next((line for line in said.decode(errors="replace").split("\n") if pattern.search(line)), None)
            if found is not None:
                self._fail(f"{found[:300]!r} after {message}")
        if wanted not in self.notes.read_text():
            self._fail(f"no good task runs within 5 s after {message}")

    def _addressed(self, message: Hostile) -> RawMessage:
        if message.raw.routing_key != REPLIES or not self.ground.has_reply_queues:
            return message.raw
        assert self.client.backend is not None
        return replace(message.raw, routing_key=self.client.backend.reply_to())

    def _mixed(self, hostile: list[RawMessage]) -> Iterator[RawMessage]:
        # A batch of one may be refused, and a good message with it.
        for place, message in enumerate(hostile):
            yield message
            if place % GOOD_EVERY == 0 and len(hostile) > 1:
                yield self._good()

    def _good(self) -> RawMessage:
        tag = f"good-{self._good_sent}"
        self._good_sent += 1
        headers = {"lang": "py", "task": "fuzzed.good", "id": tag, "retries": 0, "root_id": tag, "ignore_result": True}
        properties = {
            "content_type": "application/json", "content_encoding": "utf-8", "headers": headers, "delivery_mode": 2,
            "correlation_id": tag, "message_id": tag,
        }  # fmt: skip
        return RawMessage(properties, b"[[1], {}, {}]", "", QUEUE)

    def _note_refusal(self, batch: list[Hostile], error: Refused) -> None:
        if len(batch) == 1:
            self._refused.add(batch[0].number)
            return
        self._uncertain.update(message.number for message in batch)
        self._fail(f"the broker refused one of {batch[0].number}…{batch[-1].number}: {error}")

    def _died(self, batch: list[Hostile]) -> None:
        self._fail(f"the worker ended before {batch[0].number}: exit code {self.worker.process.returncode}")
        if sum("the worker ended" in failure for failure in self.report.failures) > 20:
            raise AssertionError("it does not live")
        self.worker.start()

    # -- waiting

    def _wait(self) -> None:
        """Until the work queue is empty, nothing is done any more and nothing is about to leave the delay queues."""
        with self.ground.connect() as connection:
            while True:
                self._until_quiet(connection)
                waiting = self._counts().get(QUEUE, 0)
                if not waiting:
                    return
                self._idle_for += 1
                if self._idle_for > 10:
                    self._fail(f"stuck: {waiting} messages are in the work queue, and nothing moves")
                    return

    def _until_quiet(self, connection: Connection) -> None:
        """Nothing is logged, and nothing waits for a worker, for some seconds: longer than a retry's delay."""
        since, before = time.monotonic(), (0, 0)
        while time.monotonic() - since < QUIET:
            if self.worker.process.poll() is not None:
                self._died([self.messages[-1]])
            now = (connection.ready(QUEUE), self.worker.log_path.stat().st_size)
            if now != before:
                since, before = time.monotonic(), now
                self._idle_for = 0
            time.sleep(0.2)

    def _counts(self) -> dict[str, int]:
        return self.ground.counts()

    # -- looking

    def _memory(self) -> int:
        text = Path(f"/proc/{self.worker.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024

    def _connections(self) -> set[str]:
        """The worker's: idle ones of the producer have their own ends."""
        return self.ground.connections(NODE)

    def _good_results(self, when: str, count: int) -> None:
        """A producer with results, a chord and a delayed task, beside all that."""
        results = [self.client.send_task("fuzzed.good", (n,), queue=QUEUE) for n in range(count)]
        values = [result.get(timeout=LONG) for result in results]
        if values != list(range(count)):
            self._fail(f"{when}: results are {values}")
        parts = group(self.client.signature("fuzzed.good", (n,), queue=QUEUE) for n in range(3))
        # Makes the exchanges of three delay levels.
        self.client.send_task("fuzzed.good", (0,), queue=QUEUE, countdown=33)
        total = chord(parts)(self.client.signature("fuzzed.total", queue=QUEUE)).get(timeout=LONG)
        if total != 3:
            self._fail(f"{when}: a chord gave {total}")

    def _look_alive(self) -> None:
        if not self.client.control.inspect(destination=[NODE], timeout=10).ping():
            self._fail("no answer to inspect ping")
        for page in ("/live", "/ready"):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
            connection.request("GET", page)
            answer = connection.getresponse()
            if answer.status != 200:
                self._fail(f"{page} says {answer.status} {answer.read()!r}")
            connection.close()

    def _stop(self) -> None:
        if self.worker.process.poll() is not None:
            self._fail(f"the worker had ended: exit code {self.worker.process.returncode}")
            return
        try:
            code = self.worker.stop()
        except NeverHappened as error:
            self._fail(f"TERM: {str(error)[:2000]}")
            return
        if code:
            self._fail(f"TERM: exit code {code}")

    # -- accounting

    def _account(self) -> None:
        ran, good, dropped = self._noted()
        dead = self._drained([f"{QUEUE}.dead"], must_say_why=True)
        delayed = self._drained([name for name in self._counts() if name.startswith("amqtask.delay.")])
        limited = set(_LIMITED.findall(self.worker.log)) - set(ran)  # before they began
        places = {"ran": set(ran) | limited, "dead": dead, "dropped": dropped, "delayed": delayed}
        for message in self.messages:
            if message.ends and message.number not in self._refused:
                self._ended_once(message, [place for place, tags in places.items() if f"fz-{message.number}" in tags])
        several = [tag for tag, count in ran.items() if count > 2]
        if several:
            self._fail(f"ran more than twice: {several[:20]}")
        lost = [n for n in range(self._good_sent) if good[f"good-{n}"] == 0]
        twice = [n for n in range(self._good_sent) if good[f"good-{n}"] > 1]
        if lost or twice:
            where = {place: sum(f"good-{n}" in tags for n in lost) for place, tags in places.items()}
            self._fail(
                f"of {self._good_sent} good tasks {len(lost)} never ran ({where}), {len(twice)} ran twice: {lost[:5]}"
            )
        report = self.report
        report.good, report.ran, report.dead = self._good_sent - len(lost), len(ran), len(dead)
        report.dropped, report.delayed, report.refused = len(dropped), len(delayed), len(self._refused)

    def _ended_once(self, message: Hostile, places: list[str]) -> None:
        if len(places) == 1 or (message.number in self._uncertain and not places):
            return
        self._fail(f"{places or 'nowhere'}: {message}")

    def _noted(self) -> tuple[Counter[str], Counter[str], set[str]]:
        """Tags of what ran, of what good ones ran, of what was dropped."""
        ran: Counter[str] = Counter()
        good: Counter[str] = Counter()
        dropped: set[str] = set()
        counted = 0
        for line in self.notes.read_text().splitlines():
            kind, *names, is_counted = json.loads(line)
            tag = next((name for name in names if _TAG.fullmatch(name)), "")
            if not tag:
                continue
            match kind:
                case "good":
                    good[tag] += 1
                    counted += is_counted
                case "ran":
                    ran[tag] += 1
                case _:
                    dropped.add(tag)
        if counted:
            self._fail(f"{counted} good tasks were delivered before")
        return ran, good, dropped

    def _drained(self, queues: Iterable[str], *, must_say_why: bool = False) -> set[str]:
        found: list[str] = []
        with self.ground.connect() as connection:
            for queue in queues:
                for properties, _ in connection.drain(queue):
                    tag = properties.get("message_id", b"").decode(errors="replace")
                    found.append(tag)
                    headers = properties.get("headers", b"")
                    if (
                        must_say_why
                        and _TAG.fullmatch(tag)
                        and b"x-amqtask-reason" not in headers
                        and b"x-death" not in headers
                    ):
                        self._fail(f"{tag} is a dead letter without a reason: {headers[:500]!r}")
        # At least once: what is on its way goes again when the broker closes the channel for another message.
        self.report.doubled += sum(
            count > 1 and _TAG.fullmatch(tag) is not None for tag, count in Counter(found).items()
        )
        return {tag for tag in found if _TAG.fullmatch(tag)}

    def _look_at_log(self) -> None:
        raw = self.worker.log_path.read_bytes()
        lines = raw.split(b"\n")
        self.report.longest_line = max(map(len, lines))
        long = [line for line in lines if len(line) > LONGEST_LINE]
        if long:
            self._fail(
                f"{len(long)} log lines over {LONGEST_LINE} bytes, the longest has {len(max(long, key=len))}: {long[0][:200]!r}"
            )
        controls = [line for line in lines if _CONTROL.search(line.decode(errors="replace"))]
        if controls:
            self._fail(f"{len(controls)} log lines with control characters: {controls[0][:300]!r}")
        lost = [line for line in lines if _LOST.search(line.decode(errors="replace"))]
        if lost:
            self._fail(f"{len(lost)} log lines about lost connections: {lost[0][:300]!r}")
        keep = os.environ.get("FUZZ_KEEP")
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            (Path(keep) / f"{self.report.pool}.log").write_bytes(raw)
