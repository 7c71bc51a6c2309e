"""The only place that knows pika and aio-pika."""
