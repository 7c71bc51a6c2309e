"""The transactional outbox: calls made in a database transaction are rows of it, which a relay publishes once it is committed.

`contract` says what an outbox is, and what a row is; `relay` publishes rows. Django's and SQLAlchemy's are in `amqtask.contrib`.
"""
