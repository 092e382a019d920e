"""A loopback server that speaks the hub's API to the real client, with faults on demand.

Answers `/api/datasets/ID[/revision/REV]`, `/tree/REV`, `/paths-info/REV` and `/datasets/ID/resolve/REV/PATH` with
ranges, as `datasets` 4 and `huggingface_hub` ask for them (`HF_ENDPOINT`), and takes small files (`/commit/REV`).
"""

import base64
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Faults:
    """What the next requests for data suffer, once `after` of them have gone well; counted once `since` exists."""

    def __init__(self) -> None:
        self.arm()

    def arm(
        self,
        since: Path | None = None,
        after: int = 0,
        statuses: Sequence[tuple[int, dict[str, str]]] = (),
        resets: int = 0,
        stalls: int = 0,
        slow: int = 0,
    ) -> None:
        """`statuses` are answered instead of data; then bodies are reset half-way, stop there, or come slowly."""
        self.since, self.after = since, after
        self.line: list[Any] = [*statuses, *["reset"] * resets, *["stall"] * stalls, *["slow"] * slow]

    @property
    def idle(self) -> bool:
        return not self.line

    def next(self) -> Any:
        """The fault of this request, or `None`."""
        if not self.line or (self.since and not self.since.exists()):
            return None
        if self.after > 0:
            self.after -= 1
            return None
        return self.line.pop(0)


class HubServer:
    """`files` maps a set's id to {path: bytes}; `gated` sets answer 403 to their files without the right token."""

    def __init__(self, sets: dict[str, dict[str, bytes]], gated: frozenset[str] = frozenset(), token: str = "") -> None:
        self.sets, self.gated, self.token = sets, gated, token
        self.faults = Faults()
        self.lock, self.released = threading.Lock(), threading.Event()
        self.unknown: list[str] = []
        self.sent: Counter[str] = Counter()  # bytes of each path
        self.away: set[str] = set()  # sets at whose name the server resets the connection
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, files in self.hub.sets.items():
            if name in self.hub.away and name in path:
                return self._reset()
            if path.startswith(f"/api/datasets/{name}"):
                return self._api(name, files, path.removeprefix(f"/api/datasets/{name}"))
            if path.startswith(f"/datasets/{name}/resolve/"):
                _, _, file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")
                return self._resolve(name, files, file)
        self.hub.unknown.append(f"{self.command} {path}")
        self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _api(self, name: str, files: dict[str, bytes], rest: str) -> None:
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            gated = "manual" if name in self.hub.gated else False
            info = {"id": name, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings, "tags": []}
            return self._json(200, info)
        if rest.startswith("/tree/"):
            folder = rest.removeprefix("/tree/").partition("/")[2]
            prefix = f"{folder}/" if folder else ""
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            below = {path: data for path, data in files.items() if path.startswith(prefix)}
            inside = {path: path.removeprefix(prefix) for path in below}
            found = [self._entry(path, below[path]) for path, name in inside.items() if deep or "/" not in name]
            folders = {prefix + name.partition("/")[0] for name in inside.values() if "/" in name}
            found += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            return self._json(200, found) if below else self._missing()
        if rest.startswith("/paths-info/"):
            asked = parse_qs(self.body.decode())["paths"]
            found = [self._entry(path, files[path]) for path in asked if path in files]
            folders = [p for p in asked if p not in files and any(f.startswith(f"{p}/") for f in files)]
            found += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
            return self._json(200, found)
        if rest.startswith("/preupload/"):
            asked = json.loads(self.body)["files"]
            return self._json(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]},
            )
        if rest.startswith("/commit/"):
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.hub.url}/datasets/{name}/commit/{COMMIT}"
            return self._json(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self._missing()

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _missing(self) -> None:
        self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _resolve(self, name: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._missing()
        data_file = not path.endswith(".md")
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if name in self.hub.gated and data_file and not allowed:
            message = "Access to dataset is restricted and you are not in the authorized list. It is gated."
            return self._json(403, {"error": message}, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        data = files[path]
        start, end, status = 0, len(data), 200
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(len(data), int(last or len(data)) + 1), 206
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
        }
        if self.command == "HEAD" or not data_file:
            return self._send(status, data[start:end], headers)
        self.hub.sent[path] += end - start
        return self._faulty(status, data[start:end], headers)

    def _faulty(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """A data body, or the next fault in line."""
        with self.hub.lock:
            fault = self.hub.faults.next()
        if fault is None:
            return self._send(status, body, headers)
        if isinstance(fault, tuple):
            return self._json(fault[0], {"error": "on demand"}, fault[1])
        self._head(status, len(body), headers)
        if fault == "slow":
            for at in range(0, len(body), 1 + len(body) // 16):
                self.wfile.write(body[at : at + 1 + len(body) // 16])
                self.wfile.flush()
                self.hub.released.wait(0.05)
            return None
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.hub.released.wait(30)
        return self._reset()

    def _reset(self) -> None:
        """End the connection with a reset: linger 0 makes the kernel send RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)
