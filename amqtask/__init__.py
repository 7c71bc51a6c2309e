"""amqtask: a RabbitMQ-first task queue."""

__version__ = "0.1.0"
