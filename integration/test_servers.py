"""The private servers are there, empty and of the kind that they should be."""

from __future__ import annotations

import redis

from integration.servers import Postgres, Sentinel


def test_each_postgres_database_is_new(postgres: str, postgres_server: Postgres) -> None:
    postgres_server.execute("CREATE TABLE seen (id int)", postgres)

    other = postgres_server.create_database()

    tables = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'seen'"
    assert postgres_server.execute(tables, postgres).strip() == "1"
    assert postgres_server.execute(tables, other).strip() == "0"
    postgres_server.drop_database(other)


def test_the_sentinel_knows_master_and_replica(sentinel: Sentinel) -> None:
    sentinel.master.ask("set", "a", "1")

    assert sentinel.master.ask("wait", "1", "90000").strip() == "1"
    assert sentinel.replica.ask("get", "a").strip() == "1"


def test_the_cluster_has_three_masters(redis_cluster_url: str) -> None:
    with redis.cluster.RedisCluster.from_url(redis_cluster_url) as client:
        assert len(client.get_primaries()) == 3
