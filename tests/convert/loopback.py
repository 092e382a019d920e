"""What the tests' own servers share: HTTP on a free port of this machine for the time of a `with`."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Running = TypeVar("Running", bound="LoopbackServer")


class LoopbackHandler(BaseHTTPRequestHandler):
    """Answers the requests to `owner`, the server that runs it."""

    protocol_version = "HTTP/1.1"
    owner: Any

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_head(status, None if status == 204 else len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that are killed end theirs so
            super().handle_error(request, client_address)


class LoopbackServer:
    """Serves from its making on; `handler` is the class of what answers."""

    def __init__(self, handler: type[LoopbackHandler]) -> None:
        self._http = _Http(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self: Running) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
