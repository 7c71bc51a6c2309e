"""`amqtask.serialization`: serializers and JSON types of one's own, where programs for Celery ask kombu."""

from amqtask.protocol.serialization import register, register_type

__all__ = ["register", "register_type"]
