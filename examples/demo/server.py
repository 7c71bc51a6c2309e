"""A small HTTP server that answers after a while, as the services that real tasks call do."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LATENCY = 0.03


class SlowPage(BaseHTTPRequestHandler):
    """GET /N answers N bytes after LATENCY seconds."""

    def do_GET(self) -> None:
        time.sleep(LATENCY)
        body = b"x" * int(self.path.strip("/") or 0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Accepts a burst of connections without refusing any."""

    request_queue_size = 128
    daemon_threads = True


def start() -> Server:
    """Serve on a free port from a thread."""
    server = Server(("127.0.0.1", 0), SlowPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
