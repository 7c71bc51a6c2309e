"""What becomes of Celery's settings here, where the table of settings alone does not tell: add a line for a setting you know.

A setting that has an effect (its `doc` in amqtask/settings/table.py is not empty) needs no line: it is the same, or its default
differs and the page says how to get Celery's back, unless NOTES has something better to say.
"""

from __future__ import annotations

# Settings without effect, and why.
WITHOUT_EFFECT = {
    "beat_remote_control_max_tick_age": "ping is answered on the loop that sends: no answer from a beat that stands still",
    "beat_sync_every": "each run is written down when it was sent",
    "broker_channel_error_retry": "lost channels and connections are always made anew",
    "broker_connection_max_retries": "workers try for ever, publishers for `broker_publish_timeout`",
    "broker_connection_retry": "workers try for ever, publishers for `broker_publish_timeout`",
    "broker_connection_retry_on_startup": "workers try for ever, at the start too",
    "broker_failover_strategy": "all hosts are tried in turn, beginning with the one that worked last",
    "broker_heartbeat_checkrate": "the client library checks heartbeats by itself",
    "broker_native_delayed_delivery_queue_type": "queues for delays are of `task_default_queue_type`",
    "broker_pool_acquire_timeout": "part of `broker_publish_timeout`",
    "control_queue_durable": "queues for commands and replies belong to one connection, as RabbitMQ 4 wants it",
    "control_queue_exclusive": "queues for commands and replies belong to one connection, as RabbitMQ 4 wants it",
    "enable_utc": (
        "times in messages are UTC; schedules follow `timezone`. With `False` and no `timezone` Celery takes the machine's zone: "
        "name it in `timezone` (`amqtask doctor` says so)"
    ),
    "event_queue_durable": "queues for events belong to one connection, as RabbitMQ 4 wants it",
    "event_queue_exclusive": "queues for events belong to one connection, as RabbitMQ 4 wants it",
    "redis_retry_on_timeout": "what failed is tried again (`retry_for` in `result_backend_transport_options`)",
    "redis_socket_keepalive": "always on; `result_backend_transport_options` may switch it off",
    "result_cache_max": "a result is kept while you hold it, and a number of others ([Results](results.md))",
    "result_chord_join_timeout": "chords are counted; nobody waits for their parts",
    "result_chord_retry_interval": "chords are counted; nobody asks for their parts again and again",
    "result_exchange": "results over `rpc://` go through the default exchange, as Celery's do",
    "result_exchange_type": "results over `rpc://` go through the default exchange, as Celery's do",
    "result_failure_expires": "`result_expires` is for failures, too",
    "task_protocol": "2 is written, 1 and 2 are read",
    "task_publish_retry": "a publish is tried until `broker_publish_timeout`",
    "task_publish_retry_policy": "a publish is tried until `broker_publish_timeout`",
    "task_remote_tracebacks": "an error that `get()` raises always has the worker's traceback as its cause",
    "task_repr_maxlevels": "arguments are described to a fixed depth",
    "task_retry_on_worker_lost": "`task_reject_on_worker_lost` and `task_delivery_limit` say what becomes of such a task",
    "worker_agent": "a worker is not put together by settings",
    "worker_autoscaler": "a worker is not put together by settings",
    "worker_cancel_long_running_tasks_on_connection_loss": "a task goes on; its redelivery is answered with what it returned",
    "worker_consumer": "a worker is not put together by settings",
    "worker_deduplicate_successful_tasks": "always so for the tasks that the worker has run itself",
    "worker_detect_quorum_queues": "nothing depends on it: prefetch is set for each consumer, delays are in the broker",
    "worker_enable_prefetch_count_reduction": "the window of deliveries never grows with running tasks",
    "worker_eta_task_limit": "tasks with an `eta` wait in the broker",
    "worker_lost_wait": "a child that died is noticed at once",
    "worker_pool_putlocks": "a worker never takes more than its slots and its window",
    "worker_pool_start_method": "children are forked",
    "worker_timer": "a worker is not put together by settings",
    "worker_timer_precision": "there is no timer to tune",
}

# Settings of result stores that are not there, by the beginning of their names.
STORES = {
    "arangodb_": "ArangoDB",
    "azureblockblob_": "Azure Block Blob",
    "cassandra_": "Cassandra",
    "cosmosdbsql_": "Cosmos DB",
    "couchbase_": "Couchbase",
    "elasticsearch_": "Elasticsearch",
    "gcs_": "Google Cloud Storage",
    "s3_": "S3",
    "database_url": "the database's URL (in `result_backend`)",
}

# Said in place of "Celery's: set it to …", where that is not what to do, or after "the same".
NOTES = {
    "beat_schedule_filename": "`amqtaskbeat-schedule.sqlite3`, an SQLite file; a Celery shelve is not read",
    "beat_scheduler": "`file`, `memory`, `django` or a class of your own; Celery's and django-celery-beat's names mean ours",
    "broker_transport_options": "with Redis what [Redis as the broker](redis.md#settings) lists; with RabbitMQ without effect",
    "database_engine_options": "the same, beneath what you say",
    "redis_socket_timeout": "5 s, or the time to connect where that is more; a value is taken as in Celery",
    "security_cert_store": "the same; looked at again while a process runs ([Signed messages](signed-messages.md))",
    "security_digest": "it holds; Celery's `app.setup_security()` takes sha256 unless it is told `digest=`",
    "task_reject_on_worker_lost": "`True`: five attempts (`task_delivery_limit`), then `<queue>.dead`; Celery's: `False`",
    "timezone": "the same: UTC",
    "worker_prefetch_multiplier": "`None`: the number of deliveries adapts itself; Celery's: `worker_prefetch_multiplier = 4`",
}
