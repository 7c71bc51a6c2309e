"""The console's ASGI application: pages for people, the same as JSON under /api, and actions by POST.

Everything that blocks (the index, the broker) runs in Starlette's threads. Templates escape all that they show; a strict content
security policy lets a browser run the console's own scripts only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from amqtask.assembly import build_indexer
from amqtask.console import openapi, pages
from amqtask.console.access import Access, Denied, User, local_path
from amqtask.console.actions import ACTIONS, ONCE
from amqtask.console.alerts import Watch, alerts
from amqtask.console.overview import overview
from amqtask.exceptions import AmqTaskError, OperationalError
from amqtask.ground.printable import bounded_logger, duration, local_time

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

logger = bounded_logger("amqtask.console")
HERE = Path(__file__).parent
# Bytes that a form may have: arguments are edited in one. Characters of any other field, and of what is told of an action.
LARGEST_FORM = 2_000_000
LONGEST_FIELD, LONGEST_NOTICE = 4_096, 1_000
# Seconds in which it has to come.
FORM_SECONDS = 10.0
# Fields that are as long as the form.
_LONG_FIELDS = ("args", "kwargs")
# Seconds between looks whether something happened, for pages that show it live.
LIVE_SECONDS = 1.0
# Seconds within which two orders for the same are one: two people look at the same failure.
ONCE_SECONDS = 10.0
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# path → (name in the menu, template, what it shows)
Look = Callable[["AmqTask", Request], "JsonObject | None"]
PAGES: dict[str, tuple[str, str, Look]] = {
    "/": (
        "Overview",
        "overview.html",
        lambda app, request: overview(app, pages.whole_number(request.query_params, "hours") or 1),
    ),
    "/tasks": ("Tasks", "tasks.html", lambda app, request: pages.search(app, request.query_params)),
    "/tasks/{task_id}": ("", "task.html", lambda app, request: pages.task(app, request.path_params["task_id"])),
    "/workflows/{some_id}": (
        "",
        "workflow.html",
        lambda app, request: pages.workflow(app, request.path_params["some_id"]),
    ),
    "/many/{action}": (
        "",
        "many.html",
        lambda app, request: pages.confirmation(app, request.path_params["action"], request.query_params),
    ),
    "/failures": (
        "Failures",
        "failures.html",
        lambda app, request: pages.failures(app, request.query_params.get("since", "")),
    ),
    "/dead": ("Dead letters", "dead.html", lambda app, request: pages.dead(app)),
    "/queues": ("Queues", "queues.html", lambda app, request: pages.queues(app)),
    "/schedules": ("Schedules", "schedules.html", lambda app, request: pages.schedules(app)),
    "/limits": ("Limits", "limits.html", lambda app, request: pages.limits(app)),
    "/queues/delayed": (
        "",
        "delayed.html",
        lambda app, request: pages.delayed(app, request.query_params),
    ),
    "/workers": ("Workers", "workers.html", lambda app, request: pages.workers(app)),
    "/alerts": ("Alerts", "alerts.html", lambda app, request: alerts(app)),
    "/audit": ("Audit", "audit.html", lambda app, request: {"actions": app.history.index.actions(200)}),
}
MENU = [(path, title) for path, (title, _, _) in PAGES.items() if title]


class Service(Protocol):
    """Something that runs in a thread of its own."""

    def run(self) -> None: ...

    def stop(self) -> None: ...


class Console:
    """The requests' handlers; `access` says who may do what."""

    def __init__(self, app: AmqTask, access: Access, is_ending: Callable[[], bool]) -> None:
        self._app = app
        self._access = access
        self._is_ending = is_ending
        self._templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True)
        self._templates.filters.update(
            duration=duration, local=_local, localiso=_iso, json=lambda value: json.dumps(value, default=str, indent=2)
        )

    def routes(self) -> list[Route | Mount]:
        """All addresses."""
        routes: list[Route | Mount] = [Mount("/static", StaticFiles(directory=HERE / "static"))]
        for path, (_, template, look) in PAGES.items():
            # An id may have slashes in it.
            html, api = (one.replace("_id}", "_id:path}") for one in (path, openapi.api_path(path)))
            routes.append(Route(html, self._guarded(partial(self._page, template, look))))
            routes.append(Route(api, self._guarded(partial(self._json, look))))
        if self._access.login is not None:
            routes += self._access.login.routes(self._answering)
        routes.append(Route("/api/openapi.json", self._guarded(self._description)))
        routes.append(Route("/live", self._guarded(self._live)))
        routes.append(Route("/api/do/{action}", self._guarded(partial(self._act, True)), methods=["POST"]))
        routes.append(Route("/do/{action}", self._guarded(partial(self._act, False)), methods=["POST"]))
        return routes

    def _guarded(self, handler: Callable[[Request, User], Any]) -> Callable[[Request], Any]:
        """Find out who asks, and turn errors into answers."""

        async def guarded(request: Request) -> Response:
            user = await run_in_threadpool(self._access.user, request.headers, request.scope.get("session"))
            response: Response = await handler(request, user)
            return response

        return self._answering(guarded)

    def _answering(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Turn errors into answers."""

        async def answering(request: Request) -> Response:
            try:
                response: Response = await handler(request)
            except Denied as error:
                response = self._denied(request, error)
            except AmqTaskError as error:
                response = self._error(request, str(error), 503 if isinstance(error, OperationalError) else 400)
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody reads it
            response.headers.update(HEADERS)
            return response

        return answering

    def _denied(self, request: Request, error: Denied) -> Response:
        # A script cannot follow to the provider's page.
        is_scripted = _is_api(request) or "hx-request" in request.headers or _path(request) == "/live"
        is_look = request.method in ("GET", "HEAD") and not is_scripted
        if error.status == 401 and self._access.login is not None and is_look:
            root = request.scope.get("root_path", "")
            target = _path(request) + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"{root}/login?{urlencode({'next': target})}", 303)
        response = self._error(request, str(error), error.status)
        if error.status == 401 and self._access.login is None:
            response.headers["WWW-Authenticate"] = 'Basic realm="amqtask console", charset="UTF-8"'
        return response

    def _error(self, request: Request, text: str, status: int) -> Response:
        if _is_api(request):
            return JSONResponse({"error": text}, status)
        return HTMLResponse(self._rendered("error.html", request, None, {"error": text}), status)

    async def _page(self, template: str, look: Look, request: Request, user: User) -> Response:
        shown = await run_in_threadpool(look, self._app, request)
        if shown is None:
            return self._error(request, "There is no such task in the history.", 404)
        return HTMLResponse(await run_in_threadpool(self._rendered, template, request, user, shown))

    def _rendered(self, template: str, request: Request, user: User | None, shown: JsonObject) -> bytes:
        page = self._templates.get_template(template).render(
            **shown,
            root=request.scope.get("root_path", ""),
            path=_path(request),
            menu=MENU,
            user=user.name if user else "",
            may_change=user is not None and user.may_change,
            can_log_out=user is not None and self._access.login is not None,
            notice=request.query_params.get("notice", ""),
            states=pages.STATES,
            app_name=self._app.main or "amqtask",
            urlencode=urlencode,
        )
        return page.encode(errors="replace")

    async def _json(self, look: Look, request: Request, user: User) -> Response:
        shown = await run_in_threadpool(look, self._app, request)
        if shown is None:
            return JSONResponse({"error": "there is no such task in the history"}, 404)
        return Response(json.dumps(shown, default=_as_text), media_type="application/json")

    async def _description(self, request: Request, user: User) -> Response:
        return JSONResponse(openapi.document(list(PAGES), ACTIONS, root=request.scope.get("root_path", "")))

    async def _act(self, is_api: bool, request: Request, user: User) -> Response:
        self._access.check_change(user, request.headers)
        form = await _form(request)
        name = request.path_params["action"]
        action = ACTIONS.get(name)
        if action is None:
            raise Denied(404, f"there is no action {name}")
        notice = await run_in_threadpool(self._do, name, form, user)
        if is_api:
            return JSONResponse({"done": notice})
        target = local_path(form.get("back") or "/")
        separator = "&" if "?" in target else "?"
        root = request.scope.get("root_path", "")
        told = notice if len(notice) <= LONGEST_NOTICE else f"{notice[:LONGEST_NOTICE]}…"
        return RedirectResponse(f"{root}{target}{separator}{urlencode({'notice': told})}", 303)

    def _do(self, name: str, form: Mapping[str, str], user: User) -> str:
        index = self._app.history.index
        # What a task is called with is nobody's to see.
        subject = {
            key: "…" if key in _LONG_FIELDS else value for key, value in form.items() if key not in ("back", "confirm")
        }
        number = index.begin_action(user.name, name, json.dumps(subject))
        try:
            if name in ONCE and not any(form.get(field) for field in _LONG_FIELDS):
                self._check_first(number)
            notice = ACTIONS[name](self._app, form, user.name)
        except (AmqTaskError, Denied) as error:
            self._note(number, f"refused: {error}")
            raise
        self._note(number, notice)
        return notice

    def _check_first(self, number: int) -> None:
        """Raises: Denied where somebody has just asked for the same."""
        earlier = self._app.history.index.same_action(number, ONCE_SECONDS)
        if earlier is not None:
            raise Denied(409, f"{earlier} has just asked for the same: the list of tasks shows what came of it")

    def _note(self, number: int, outcome: str) -> None:
        """Note what came of an action. It is done, whether that can be written down or not."""
        try:
            self._app.history.index.end_action(number, outcome)
        except OperationalError as error:
            logger.warning("console: the outcome of action %d, %s, cannot be noted: %s", number, outcome, error)

    async def _live(self, request: Request, user: User) -> Response:
        """Server-sent events: one whenever something was taken in (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

        async def news() -> AsyncIterator[str]:
            last = None
            yield "retry: 3000\n\n"
            while not (self._is_ending() or await request.is_disconnected()):
                try:
                    await run_in_threadpool(self._access.user, request.headers, request.scope.get("session"))
                    newest = await run_in_threadpool(self._app.history.index.changes)
                except Denied:
                    return  # the login is over: the next attempt is told so
                except OperationalError as error:
                    yield f"event: trouble\ndata: {json.dumps(str(error))}\n\n"
                    last = None
                else:
                    yield ": still here\n\n" if newest == last else "event: news\ndata: now\n\n"
                    last = newest
                await asyncio.sleep(LIVE_SECONDS)

        return StreamingResponse(news(), media_type="text/event-stream")


class Form(dict[str, str]):
    """The fields of a form. One that an action needs and that is not there raises Denied."""

    def __missing__(self, name: str) -> str:
        raise Denied(400, f"the field '{name}' is missing")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            raise Denied(413, f"a form has at most {LARGEST_FORM} bytes")
    return bytes(body)


async def _form(request: Request) -> Form:
    """The fields of a form, or of a JSON object. Raises: Denied."""
    try:
        body = await asyncio.wait_for(_body(request), FORM_SECONDS)
    except asyncio.TimeoutError:
        raise Denied(408, f"the form did not come within {FORM_SECONDS:g} s") from None
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            fields = json.loads(body or b"{}")
            if not isinstance(fields, dict):
                raise Denied(400, "a JSON object is wanted")
            form = {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        else:
            form = dict(parse_qsl(body.decode(), keep_blank_values=True))
    except (ValueError, RecursionError) as error:
        raise Denied(400, f"the form cannot be read: {error}") from error
    for name, value in form.items():
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise Denied(400, f"the field {name[:100]!a} has characters that are no text")
        if len(name) > LONGEST_FIELD or (name not in _LONG_FIELDS and len(value) > LONGEST_FIELD):
            raise Denied(400, f"the field {name[:100]!a} is longer than {LONGEST_FIELD} characters")
    return Form(form)


def console(
    app: AmqTask,
    *,
    access: Access | None = None,
    indexes: bool = True,
    watches: bool = True,
    is_ending: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The console of an application, to be served or mounted.

    With `indexes` it also reads kept events into the index, and with `watches` it looks whether an alert is due, each in a thread
    of its own. A server waits for pages that are open: they get no more news once `is_ending`. Raises: ConfigurationError."""
    watch = Watch(app) if watches else None

    @contextlib.asynccontextmanager
    async def lifespan(starlette: Starlette) -> AsyncIterator[None]:
        services: list[Service] = [build_indexer(app, is_patient=True)] if indexes and app.broker.is_shared else []
        services += [watch] if watch is not None and app.broker.is_shared else []
        threads = [threading.Thread(target=one.run, name=f"amqtask {type(one).__name__}") for one in services]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for one in services:
                one.stop()
            for thread in threads:
                await run_in_threadpool(thread.join)

    access = access or Access()
    middleware = [access.login.middleware()] if access.login is not None else []
    return Starlette(routes=Console(app, access, is_ending).routes(), middleware=middleware, lifespan=lifespan)


def _path(request: Request) -> str:
    """The path within the console, which may be mounted somewhere."""
    return request.url.path.removeprefix(request.scope.get("root_path", ""))


def _is_api(request: Request) -> bool:
    return _path(request).startswith("/api/")


def _local(moment: object) -> str:
    """A time, also one in ISO 8601; what is another text stays."""
    if isinstance(moment, (int, float)):
        moment = datetime.fromtimestamp(moment, timezone.utc)
    if isinstance(moment, str):
        try:
            return local_time(datetime.fromisoformat(moment)) or ""
        except (ValueError, OverflowError):
            return moment
    return local_time(moment) or "" if isinstance(moment, datetime) else ""


def _iso(moment: object) -> str:
    return moment.isoformat() if isinstance(moment, datetime) else ""


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
