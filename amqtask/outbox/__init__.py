"""The transactional outbox: calls made in a database transaction are rows of it, which a relay publishes once it is committed."""
