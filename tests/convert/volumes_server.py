"""A loopback server that speaks the Files API of Databricks volumes to the real client (`DATABRICKS_HOST`)."""

from urllib.parse import parse_qs, unquote, urlsplit

from tests.convert.loopback import LoopbackHandler, LoopbackServer

TOKEN = "dapi0123456789abcdef0123456789abcdef"


class VolumesServer(LoopbackServer):
    """`files` maps paths (`/Volumes/...`) to bytes; what is there is replaced only where the client says so."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        super().__init__(_Handler)

    @property
    def environment(self) -> dict[str, str]:
        return {"DATABRICKS_HOST": self.url, "DATABRICKS_TOKEN": TOKEN}


class _Handler(LoopbackHandler):
    owner: VolumesServer

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        if self._path in self.owner.files and parse_qs(urlsplit(self.path).query).get("overwrite") != ["true"]:
            self._error(409, "ALREADY_EXISTS")
            return
        self.owner.files[self._path] = data
        self.send(204, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._refused():
            return
        if (data := self.owner.files.get(self._path)) is None:
            self._error(404, "NOT_FOUND")
            return
        self.send(200, data, {"Content-Type": "application/octet-stream"})

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/api/2.0/fs/files")

    def _refused(self) -> bool:
        if refused := self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(403, "PERMISSION_DENIED")
        return refused

    def _error(self, status: int, code: str) -> None:
        self.send_json(status, {"error_code": code, "message": "on loopback"})
