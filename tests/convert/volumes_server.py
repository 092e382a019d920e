"""A loopback server that speaks the Files API of Databricks volumes to the real client (`DATABRICKS_HOST`)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "dapi0123456789abcdef0123456789abcdef"


class VolumesServer:
    """`files` maps paths (`/Volumes/...`) to bytes; what is there is replaced only where the client says so."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"volumes": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"DATABRICKS_HOST": f"http://127.0.0.1:{self._server.server_port}", "DATABRICKS_TOKEN": TOKEN}

    def __enter__(self) -> "VolumesServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    volumes: VolumesServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        if self._path in self.volumes.files and parse_qs(urlsplit(self.path).query).get("overwrite") != ["true"]:
            self._error(409, "ALREADY_EXISTS")
            return
        self.volumes.files[self._path] = data
        self._send(204, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._refused():
            return
        if (data := self.volumes.files.get(self._path)) is None:
            self._error(404, "NOT_FOUND")
            return
        self._send(200, data)

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/api/2.0/fs/files")

    def _refused(self) -> bool:
        if refused := self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(403, "PERMISSION_DENIED")
        return refused

    def _error(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error_code": code, "message": "on loopback"}).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
