"""A loopback server that speaks what `alipcs_py` asks of the Alipan drive: files in folders, by their ids.

As the drive does, it takes no body of a file it knows ("rapid upload"): asked with the SHA-1 of a file's first KiB
it answers whether some file begins so, and then wants the SHA-1 of the whole.
"""

import json
from hashlib import sha1
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tests.convert.loopback import LoopbackHandler, LoopbackServer

TOKEN = "0123456789abcdef0123456789abcdef"
NEVER = "x-oss-expires=99999999999"


class DriveServer(LoopbackServer):
    """`files` maps paths to bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = set()
        self.uploads: dict[str, bytearray] = {}  # by path, until complete
        self.unknown: list[str] = []
        super().__init__(_Handler)


class _Handler(LoopbackHandler):
    """A file's id is its path without the slash at its head; `root` is the drive's."""

    owner: DriveServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = urlsplit(self.path).path
        if path == "/token/refresh":
            self._token(asked["refresh_token"])
        elif self.headers.get("Authorization") != f"Bearer access-{TOKEN}":
            self._refuse(401, "AccessTokenInvalid")
        elif path == "/users/v1/users/device/create_session":
            self.send_json(200, {"result": True, "success": True})
        elif path == "/v2/file/get_by_path":
            self._entry(asked["file_path"].lstrip("/"))
        elif path == "/v2/file/get":
            self._entry(asked["file_id"])
        elif path == "/adrive/v3/file/list":
            self._list(asked["parent_file_id"])
        elif path == "/adrive/v2/file/createWithFolders":
            self._create(asked)
        elif path == "/v2/file/complete":
            self.owner.files["/" + asked["file_id"]] = bytes(self.owner.uploads.pop(asked["file_id"]))
            self._entry(asked["file_id"])
        else:
            self.owner.unknown.append(path)
            self._refuse(404, "NotFound")

    def do_PUT(self) -> None:
        """The parts of an upload come in order."""
        id = urlsplit(self.path).path.removeprefix("/upload/")
        self.owner.uploads[id.replace("%20", " ")] += self.rfile.read(int(self.headers["Content-Length"]))
        self.send(200, b"")

    def do_GET(self) -> None:
        data = self.owner.files[urlsplit(self.path).path.replace("%20", " ").removeprefix("/data")]
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        found = data[begin : end + 1]
        self.send(206, found, {"Content-Range": f"bytes {begin}-{begin + len(found) - 1}/{len(data)}"})

    def _token(self, refresh: str) -> None:
        if refresh != TOKEN:
            return self._refuse(400, "InvalidParameter.RefreshToken")
        known = ("user_id", "user_name", "nick_name", "device_id", "default_drive_id", "role", "status")
        tokens = {"refresh_token": TOKEN, "access_token": f"access-{TOKEN}", "token_type": "Bearer"}
        self.send_json(200, {**dict.fromkeys(known, "1"), **tokens, "expire_time": "2100-01-01T00:00:00Z"})

    def _entry(self, id: str) -> None:
        found = self._describe(id)
        self.send_json(200, found) if found else self._refuse(404, "NotFound.File")

    def _describe(self, id: str) -> dict[str, Any]:
        path = PurePosixPath(id)
        kind = {"file_id": id, "name": path.name, "parent_file_id": str(path.parent) if path.parent.name else "root"}
        if id in self.owner.folders:
            return {**kind, "type": "folder"}
        data = self.owner.files.get(f"/{id}")
        if data is None:
            return {}
        url = f"{self.owner.url}/data/{id}?{NEVER}".replace(" ", "%20")
        return {**kind, "type": "file", "size": len(data), "content_hash": sha1(data).hexdigest().upper(), "url": url}

    def _list(self, parent: str) -> None:
        known = [*self.owner.folders, *(path.lstrip("/") for path in self.owner.files)]
        found = [entry for entry in map(self._describe, sorted(known)) if entry["parent_file_id"] == parent]
        self.send_json(200, {"items": found, "next_marker": ""})

    def _create(self, asked: dict[str, Any]) -> None:
        parent = asked["parent_file_id"]
        id = asked["name"] if parent == "root" else f"{parent}/{asked['name']}"
        if asked["type"] == "folder":
            self.owner.folders.add(id)
            return self._entry(id)
        datas = list(self.owner.files.values())
        if asked["pre_hash"] and asked["pre_hash"] in {sha1(data[:1024]).hexdigest() for data in datas}:
            return self._refuse(409, "PreHashMatched", pre_hash=asked["pre_hash"])
        whole = asked["content_hash"].lower()
        same = next((data for data in datas if sha1(data).hexdigest() == whole), None)
        if same is not None:
            self.owner.files[f"/{id}"] = same
            return self.send_json(201, {"file_id": id, "rapid_upload": True})
        assert asked["check_name_mode"] == "overwrite"
        self.owner.uploads[id] = bytearray()
        parts = [
            {"part_number": part["part_number"], "upload_url": f"{self.owner.url}/upload/{id}?{NEVER}"}
            for part in asked["part_info_list"]
        ]
        return self.send_json(201, {"file_id": id, "upload_id": "1", "rapid_upload": False, "part_info_list": parts})

    def _refuse(self, status: int, code: str, **more: str) -> None:
        self.send_json(status, {"code": code, "message": "on loopback", **more})
