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
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.convert.loopback import LoopbackHandler, LoopbackServer

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


class HubServer(LoopbackServer):
    """`files` maps a set's id to {path: bytes}; `gated` sets answer 403 to their files without the right token."""

    def __init__(self, sets: dict[str, dict[str, bytes]], gated: frozenset[str] = frozenset(), token: str = "") -> None:
        self.sets, self.gated, self.token = sets, gated, token
        self.faults = Faults()
        self.lock, self.released = threading.Lock(), threading.Event()
        self.unknown: list[str] = []
        self.sent: Counter[str] = Counter()  # bytes of each path
        self.away: set[str] = set()  # sets at whose name the server resets the connection
        self.instead: dict[str, list[tuple[int, dict[str, str]]]] = {}  # a card's, or `commit`'s, next answers
        super().__init__(_Handler)

    def __exit__(self, *_: object) -> None:
        self.released.set()
        super().__exit__()


class _Handler(LoopbackHandler):
    owner: HubServer

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, files in self.owner.sets.items():
            if name in self.owner.away and name in path:
                return self._reset()
            if path.startswith(f"/api/datasets/{name}"):
                return self._api(name, files, path.removeprefix(f"/api/datasets/{name}"))
            if path.startswith(f"/datasets/{name}/resolve/"):
                _, _, file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")
                return self._resolve(name, files, file)
        self.owner.unknown.append(f"{self.command} {path}")
        self.send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _api(self, name: str, files: dict[str, bytes], rest: str) -> None:
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            gated = "manual" if name in self.owner.gated else False
            info = {"id": name, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings, "tags": []}
            return self.send_json(200, info)
        if rest.startswith("/tree/"):
            folder = rest.removeprefix("/tree/").partition("/")[2]
            prefix = f"{folder}/" if folder else ""
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            below = {path: data for path, data in files.items() if path.startswith(prefix)}
            inside = {path: path.removeprefix(prefix) for path in below}
            found = [self._entry(path, below[path]) for path, name in inside.items() if deep or "/" not in name]
            folders = {prefix + name.partition("/")[0] for name in inside.values() if "/" in name}
            found += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            return self.send_json(200, found) if below else self._missing()
        if rest.startswith("/paths-info/"):
            asked = parse_qs(self.body.decode())["paths"]
            found = [self._entry(path, files[path]) for path in asked if path in files]
            folders = {p for p in asked if p not in files and any(f.startswith(f"{p}/") for f in files)}
            found += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            return self.send_json(200, found)
        if rest.startswith("/preupload/"):
            asked = json.loads(self.body)["files"]
            return self.send_json(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]},
            )
        if rest.startswith("/commit/") and self.owner.instead.get("commit"):
            return self._instead("commit")
        if rest.startswith("/commit/"):
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            url = f"{self.owner.url}/datasets/{name}/commit/{COMMIT}"
            return self.send_json(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        self.owner.unknown.append(f"{self.command} {self.path}")
        return self._missing()

    def _instead(self, what: str) -> None:
        status, headers = self.owner.instead[what].pop(0)
        self.send_json(status, {"error": "on demand"}, headers)

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _missing(self) -> None:
        self.send_json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _resolve(self, name: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._missing()
        if self.owner.instead.get(path):
            return self._instead(path)
        data_file = not path.endswith(".md")
        allowed = self.headers.get("Authorization") == f"Bearer {self.owner.token}"
        if name in self.owner.gated and data_file and not allowed:
            message = "Access to dataset is restricted and you are not in the authorized list. It is gated."
            return self.send_json(403, {"error": message}, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
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
            return self.send(status, data[start:end], headers)
        self.owner.sent[path] += end - start
        return self._faulty(status, data[start:end], headers)

    def _faulty(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """A data body, or the next fault in line."""
        with self.owner.lock:
            fault = self.owner.faults.next()
        if fault is None:
            return self.send(status, body, headers)
        if isinstance(fault, tuple):
            return self.send_json(fault[0], {"error": "on demand"}, fault[1])
        self.send_head(status, len(body), headers)
        if fault == "slow":
            for at in range(0, len(body), 1 + len(body) // 16):
                self.wfile.write(body[at : at + 1 + len(body) // 16])
                self.wfile.flush()
                self.owner.released.wait(0.05)
            return None
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.owner.released.wait(30)
        return self._reset()

    def _reset(self) -> None:
        """End the connection with a reset: linger 0 makes the kernel send RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
