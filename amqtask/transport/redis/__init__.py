"""Redis and Valkey as a broker, in kombu's layout (kombu/transport/redis.py), with leases in place of its visibility timeout."""
