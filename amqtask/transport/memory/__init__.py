"""An in-process broker with RabbitMQ's semantics, and the transport's contracts on it: for tests without sockets."""
