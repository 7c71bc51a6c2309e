"""`uvicorn examples.fastapi_progress.service:service`, then http://127.0.0.1:8000/."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, StreamingResponse

from amqtask import AsyncResult
from amqtask.contrib.asgi import lifespan
from examples.fastapi_progress.tasks import app, report

service = FastAPI(lifespan=lifespan(app))

PAGE = """<!doctype html>
<title>Report</title>
<button onclick="order()">Report</button> <progress value=0></progress> <output></output>
<script>
async function order() {
  const ordered = await (await fetch("/reports?pages=20", {method: "POST"})).json()
  const events = new EventSource(`/reports/${ordered.id}/events`)
  const bar = document.querySelector("progress"), out = document.querySelector("output")
  events.addEventListener("PROGRESS", event => { ({page: bar.value, pages: bar.max} = JSON.parse(event.data)) })
  for (const end of ["SUCCESS", "FAILURE", "REVOKED"])
    events.addEventListener(end, event => { out.value = JSON.parse(event.data); events.close() })
}
</script>"""


@service.get("/", response_class=HTMLResponse)
async def page() -> str:
    """A button, a progress bar."""
    return PAGE


@service.post("/reports", status_code=202)
async def order(pages: int, seconds: float = 0.2) -> dict[str, str]:
    """Answers when the broker has confirmed the task; the event loop serves others meanwhile."""
    return {"id": (await report.adelay(pages, seconds)).id}


@service.get("/reports/{task_id}")
async def wait(task_id: str) -> str:
    """The report, when it is ready."""
    return await AsyncResult[str](task_id, app=app).aget(timeout=60)


@service.get("/reports/{task_id}/events")
async def events(task_id: str) -> StreamingResponse:
    """An event for each state that is seen, the last one with the report or the error."""

    async def stream() -> AsyncIterator[str]:
        async for state, info in AsyncResult(task_id, app=app).astates(interval=0.1):
            data = str(info) if isinstance(info, BaseException) else info
            yield f"event: {state}\ndata: {json.dumps(data)}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")
