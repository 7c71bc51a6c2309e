"""The least rights of each role on RabbitMQ, as docs/security.md gives them, and users who have them."""

from __future__ import annotations

from typing import NamedTuple

from integration.nodes import RabbitNode


class Rights(NamedTuple):
    """Three regular expressions of `rabbitmqctl set_permissions`."""

    configure: str
    write: str
    read: str


UUID = "[0-9a-f]{8}-[0-9a-f-]{27}"
# Replies of remote control: for whoever asks, and for a worker that asks its neighbours as it starts.
ASKING = rf"{UUID}\.reply\.celery\.pidbox"
# They do not survive a restart of the broker: whoever comes first declares them.
EXCHANGES = r"(reply\.)?celery\.pidbox|celeryev"
MAILBOX = r".+@.+\.celery\.pidbox"
# What was revoked, for workers that start later.
REVOKED = r"amqtask\.cancel"
SENDING = r"amq\.default|amqtask\.delay\..+"
NOTHING = "^$"
# Roles where an operator has declared the topology (`amqtask topology declare`) for the work queues `jobs` and `mail`: what is
# left to configure are queues of one process's own, and those exchanges.
OPERATED = {
    "producer": Rights(NOTHING, f"^({SENDING})$", NOTHING),
    "producer with results": Rights(f"^{UUID}$", f"^({SENDING})$", f"^{UUID}$"),
    "worker": Rights(
        rf"^({EXCHANGES}|{MAILBOX}|{ASKING}|{UUID}|{REVOKED}|amqtask\.chord\..+)$",
        rf"^({SENDING}|{EXCHANGES}|{MAILBOX}|{ASKING})$",
        rf"^((jobs|mail)(\.dead)?|amqtask\.delay\..+|{EXCHANGES}|{MAILBOX}|{ASKING}|{UUID}|{REVOKED}|amqtask\.chord\..+)$",
    ),
    "beat": Rights(r"^amqtask\.beat\..+$", f"^({SENDING})$", r"^amqtask\.beat\..+$"),
    "monitor": Rights(
        rf"^({EXCHANGES}|{ASKING}|celeryev\..+)$",
        rf"^(celery\.pidbox|{ASKING}|celeryev\..+)$",
        rf"^({EXCHANGES}|{ASKING}|celeryev\..+)$",
    ),
}


class Guarded:
    """A virtual host in which users have no more rights than they are given."""

    def __init__(self, node: RabbitNode, name: str) -> None:
        self.node, self.name = node, name
        self.operator = node.add_vhost(name)

    def user(self, role: str, rights: Rights) -> str:
        """A user who has these rights here; the URL."""
        name = f"{role.replace(' ', '-')}-{self.name}"
        three = ", ".join(f'<<"{_escaped(right)}">>' for right in rights)
        self.node.ctl(
            "eval",
            f'rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"secret">>, <<"test">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"{name}">>, <<"{self.name}">>, {three}, <<"test">>).',
        )
        return self.operator.replace("guest:guest@", f"{name}:secret@")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")
