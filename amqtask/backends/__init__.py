"""Result stores: where the outcome of a task waits for whoever asks. `registry` finds one by its URL.

A store of one's own: `contract`, `polling` for stores that are asked again and again, those of keys and values among them.
`rpc` has what came, and who waits for it; `redis_waiting` is how one waits on Redis.
"""
