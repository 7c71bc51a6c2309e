"""A stand-in for Kubernetes' API server, for `kubectl apply`: it says which kinds there are, and keeps what it is given.

What it is given it looks at with Kubernetes' own schemas, and refuses unknown fields, as a server does that is asked to
(kubectl asks for `fieldValidation=Strict`). It runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]

from integration.machine import NodeError

# The kinds that are known, by their group and version. Those of an operator have no schema here.
KINDS = {
    "v1": ("Namespace", "ServiceAccount", "Secret", "ConfigMap", "Service"),
    "apps/v1": ("Deployment",),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "rabbitmq.com/v1beta1": ("Exchange", "Queue", "Binding", "Policy", "Vhost"),
}
WITHOUT_SCHEMA = ("rabbitmq.com/",)


def plural(kind: str) -> str:
    """The kind's name in paths."""
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


def discovery(path: str) -> dict[str, Any] | None:
    """What the server says of itself; None where there is no such page."""
    groups = {version.partition("/")[0]: version for version in KINDS if "/" in version}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [
            {"name": name, "versions": [one], "preferredVersion": one}
            for name, version in groups.items()
            for one in [{"groupVersion": version, "version": version.partition("/")[2]}]
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    version = path.removeprefix("/api/" if path.startswith("/api/") else "/apis/")
    if version in KINDS:
        return {"kind": "APIResourceList", "groupVersion": version, "resources": [*map(_resource, KINDS[version])]}
    if path == "/openapi/v3":
        paths = ("api/v1", *(f"apis/{version}" for version in groups.values()))
        return {"paths": {each: {"serverRelativeURL": f"/openapi/v3/{each}"} for each in paths}}
    return _openapi(path.removeprefix("/openapi/v3/")) if path.startswith("/openapi/v3/") else None


def _resource(kind: str) -> dict[str, Any]:
    verbs = ["create", "get", "list", "patch"]
    return {"name": plural(kind), "kind": kind, "namespaced": kind != "Namespace", "verbs": verbs, "singularName": ""}


def _openapi(path: str) -> dict[str, Any]:
    """As much as tells kubectl that fields are looked at here, so that it does not do it itself."""
    version = path.partition("/")[2]
    group, _, number = version.rpartition("/")
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]

    def told(kind: str) -> dict[str, Any]:
        known = {"group": group, "version": number, "kind": kind}
        return {"patch": {"x-kubernetes-group-version-kind": known, "parameters": parameters, "responses": {}}}

    paths = {f"/{path}/{plural(kind)}/{{name}}": told(kind) for kind in KINDS[version]}
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "v1"}, "paths": paths}


class KubeServer:
    """The stand-in, while its block runs. Raises: NodeError where there is no kubectl."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.config = folder / "kubeconfig"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> KubeServer:
        if shutil.which("kubectl") is None:  # Debian 12's is of 2020, and asks a server that is of its time
            raise NodeError("kubectl is not installed")
        server = self._stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(server.shutdown)
        named = {"name": "stand-in"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{**named, "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{**named, "context": {"cluster": "stand-in", "user": "stand-in"}}],
            "users": [{**named, "user": {}}],
            "current-context": "stand-in",
        }
        self.config.write_text(json.dumps(config))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, path: str, item: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Keep an object, if it is one."""
        fault = _fault(item)
        if fault:
            return _status(422, "Invalid", fault)
        self.objects[f"{path}/{item['metadata']['name']}"] = item
        return 201, item


def _fault(item: dict[str, Any]) -> str:
    if item["apiVersion"].startswith(WITHOUT_SCHEMA):
        return ""
    try:
        kubernetes_validate.validate(item, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def _status(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    told = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": code,
    }
    return code, told


def _handler(kube: KubeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = discovery(path) or kube.objects.get(path)
            if (
                path == "/openapi/v2"
            ):  # kubectl asks for it when it is given a List; an empty one (protobuf) is one, too
                self._send(200, b"")
            else:
                self._answer(*(200, found) if found else _status(404, "NotFound", f"no {path} here"))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(*kube.take(self.path.partition("?")[0], json.loads(body)))

        def _answer(self, code: int, told: dict[str, Any]) -> None:
            self._send(code, json.dumps(told).encode())

        def _send(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    return Handler
