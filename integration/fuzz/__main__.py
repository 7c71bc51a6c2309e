"""Hostile messages to a live worker on each pool: whatever arrives, only that message is affected.

    python -m integration.fuzz [POOL …] [--seed N] [--messages N] [--only N,N …] [--singly] [--redis | --root DIR]

Recorded messages (Celery's, and our own) with one to four places of each wrong, garbage for the control exchange, reply queues,
chords and delay levels; a good task after every fourth. Every good task must run, once and at its first delivery; every hostile
message must end in one place: it ran, it lies in the dead-letter queue with a reason, it expired, or it still waits for its time.
The worker must live, answer, keep its connections, grow by less than 50 MB, log no line over 8 kB and no control character.

`--only` sends these numbers of the same seed alone: how the smallest message that does it is found. With FUZZ_KEEP=DIR the logs
are kept there.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from amqtask.transport import content
from integration.fuzz.corpus import corpus
from integration.fuzz.run import Fuzzing, Report
from integration.nodes import RabbitNode, apt_install, rabbitmq_installed

POOLS = ("prefork", "threads", "solo", "eventlet", "gevent", "asyncio")
MESSAGES = 10_000
# Failures that are printed in full.
SHOWN = 40


def main() -> int:
    """Run the pools asked for (all by default); the exit code says whether nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pools", nargs="*", choices=[*POOLS, []])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--only", default="", help="numbers of messages, with commas between them")
    parser.add_argument(
        "--singly", action="store_true", help="one by one: says which message the log's complaints are of"
    )
    parser.add_argument("--redis", action="store_true", help="on Redis, in wrong envelopes too")
    parser.add_argument("--root", default="", help="a folder (chroot) with another RabbitMQ version")
    options = parser.parse_args()
    content.install()
    if not options.redis and not options.root and not rabbitmq_installed():
        apt_install("rabbitmq-server")
    chosen = {int(number) for number in options.only.split(",") if number}
    messages = corpus(options.seed, sorted(chosen) or range(options.messages))
    if chosen:
        print("\n".join(map(str, messages)))
    reports = []
    with ExitStack() as stack:
        node = None
        if not options.redis:
            node = RabbitNode(root=options.root)
            stack.callback(node.remove)
            node.start()
        for pool in options.pools or POOLS:
            reports.append(Fuzzing(node, pool, messages, seed=options.seed, singly=options.singly).run())
            print(f"{Report.HEAD}\n{reports[-1]}", flush=True)
            for failure in reports[-1].failures[:SHOWN]:
                print(f"  - {failure}", flush=True)
    print("\n".join([Report.HEAD, *map(str, reports)]))
    return 1 if any(report.failures for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
