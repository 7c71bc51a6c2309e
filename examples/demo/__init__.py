"""The main job in one command: publish, route, run in a green pool, collect the results."""
