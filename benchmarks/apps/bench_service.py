"""A FastAPI service whose requests each await a result, and the crowd that asks it: BENCH_URL says where it is."""

import asyncio
import json
import os
import statistics
import sys
import time

import httpx
from fastapi import FastAPI

from amqtask.contrib.asgi import lifespan
from benchmarks.apps.bench_amqtask import app, same

service = FastAPI(lifespan=lifespan(app))


@service.get("/plain/{number}")
async def plain(number: int) -> int:
    """What the service costs without a task."""
    return number


@service.get("/task/{number}")
async def task(number: int) -> object:
    """A task for each request."""
    return await (await same.adelay(number)).aget(timeout=60)


async def ask(path: str, count: int) -> dict[str, float]:
    """All requests at once."""
    took: list[float] = []
    errors = 0

    async def one(session: httpx.AsyncClient, number: int) -> None:
        nonlocal errors
        started = time.perf_counter()
        try:
            answer = await session.get(f"{os.environ['BENCH_URL']}/{path}/{number}")
            errors += answer.status_code != 200 or answer.json() != number
        except httpx.HTTPError:
            errors += 1
        took.append(time.perf_counter() - started)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as session:
        await one(session, 0)
        took.clear()
        started = time.perf_counter()
        await asyncio.gather(*(one(session, number) for number in range(count)))
        seconds = time.perf_counter() - started
    cuts = statistics.quantiles(took, n=100)
    return {"per_second": count / seconds, "p50": cuts[49], "p99": cuts[98], "errors": errors}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], int(sys.argv[2])))))
