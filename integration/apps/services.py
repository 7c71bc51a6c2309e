"""Services for tests, and their tasks: `uvicorn integration.apps.services:service`, and one by aiohttp."""

from __future__ import annotations

import os
import time
from pathlib import Path

from aiohttp import web
from fastapi import FastAPI

from amqtask import AmqTask
from amqtask.contrib.aiohttp import cleanup_ctx
from amqtask.contrib.asgi import lifespan
from integration.waiting import PATIENT

app = AmqTask("services", backend="rpc://", task_default_queue=os.environ.get("SERVICES_QUEUE", "services"))
app.conf.update(PATIENT)
if "SERVICES_TIMEOUT" in os.environ:
    seconds = float(os.environ["SERVICES_TIMEOUT"])
    app.conf.update(broker_publish_timeout=seconds, broker_connection_timeout=seconds)


@app.task
def add(x: int, y: int) -> int:
    """What everybody asks for."""
    return x + y


@app.task
def wait_for(path: str) -> str:
    """Until the test says so."""
    while not Path(path).exists():
        time.sleep(0.01)
    return "there"


service = FastAPI(lifespan=lifespan(app))


@service.get("/ping")
async def ping() -> str:
    """Is answered while others wait."""
    return "pong"


@service.get("/add")
async def get_sum(x: int, y: int) -> int:
    """Waits for a worker."""
    return await (await add.adelay(x, y)).aget(timeout=60)


@service.get("/wait")
async def get_wait(path: str) -> str:
    """Waits for a worker, which waits for the test."""
    return await (await wait_for.adelay(path)).aget(timeout=60)


def aiohttp_service(_argv: list[str]) -> web.Application:
    """The same sum: `python -m aiohttp.web integration.apps.services:aiohttp_service`."""

    async def get_sum(request: web.Request) -> web.Response:
        query = request.query
        return web.json_response(await (await add.adelay(int(query["x"]), int(query["y"]))).aget(timeout=60))

    made = web.Application()
    made.cleanup_ctx.append(cleanup_ctx(app))
    made.router.add_get("/add", get_sum)
    return made
