"""A real S3 server on loopback, behind a proxy that can answer 5xx or wait: `rclone serve s3`, which can be restarted,
or SeaweedFS, which honors conditional creates."""

import http.client
from collections.abc import Callable
from pathlib import Path

import boto3

from tests.convert.faults import EXPIRED, Faults, drip, reset
from tests.convert.loopback import LoopbackHandler, LoopbackServer
from tests.convert.rclone import RcloneServer
from tests.convert.seaweed import SeaweedServer

KEY, SECRET = "CHIMERATESTKEYID0001", "chimera/test+secret/of/forty/character40"  # as long as real ones


class S3Server(LoopbackServer):
    """Buckets are the folders of `root`; `environment` is what a client needs.

    With `tls`, a certificate and its key in one file, clients talk to the server itself and not to the proxy. With
    `seaweed`, what is in the buckets is for clients alone to see.
    """

    def __init__(self, root: Path, tls: Path | None = None, seaweed: bool = False) -> None:
        self.root, self.tls = root, tls
        (root / "bucket").mkdir(parents=True)
        self.before: Callable[[str], None] = lambda _: None  # called with each request before it is passed on
        self.faults: Faults | None = None
        self.errors = 0  # 503 answers still to give
        self.given = 0
        self.requests: list[str] = []
        flags = ["--auth-key", f"{KEY},{SECRET}", "--force-path-style", "--no-cleanup"]
        flags += ["--cert", str(tls), "--key", str(tls)] if tls else []
        self._real = SeaweedServer(root, KEY, SECRET) if seaweed else RcloneServer("s3", flags, root)
        super().__init__(_Proxy)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "S3_ENDPOINT_URL": f"https://127.0.0.1:{self._real.port}" if self.tls else self.url,
            **({"AWS_CA_BUNDLE": str(self.tls)} if self.tls else {}),
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def tear(self, path: str) -> None:
        """Keep half of the object at /BUCKET/KEY, unseen by the proxy."""
        bucket, _, key = path.lstrip("/").partition("/")
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self._real.port}", region_name="us-east-1",
                              aws_access_key_id=KEY, aws_secret_access_key=SECRET)  # fmt: skip
        whole = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        client.put_object(Bucket=bucket, Key=key, Body=whole[: len(whole) // 2])

    def start(self) -> None:
        self._real.start()

    def stop(self) -> None:
        self._real.stop()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.stop()


class _Proxy(LoopbackHandler):
    owner: S3Server

    def _forward(self) -> None:
        server = self.owner
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self._body()
        server.requests.append(f"{self.command} {self.path}")
        server.before(server.requests[-1])
        if server.errors > 0:
            server.errors -= 1
            server.given += 1
            return self._answer(503, [("Content-Type", "text/plain")], b"busy")
        fault = server.faults.draw(self) if server.faults else None
        if fault == "busy":
            return self._answer(503, [], b"")
        if fault == "expired":
            return self._answer(400, [("Content-Type", "application/xml")], EXPIRED)
        if fault == "stale":
            return self._answer(404, [], b"")
        if fault == "dropped":
            return self._answer(200, [("ETag", '"0"')], b"")
        if fault == "reset":
            return self._reset()
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
        try:
            upstream = http.client.HTTPConnection("127.0.0.1", server._real.port, timeout=30)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in headers.items():
                upstream.putheader(key, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            return self._answer(502, [], b"down")
        if fault == "torn":
            server.tear(self.path)
        if fault == "lost":
            return self._reset()
        return self._answer(answer.status, answer.getheaders(), data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def _body(self) -> bytes:
        """The request's body as it came, chunk marks included."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while True:
                line = self.rfile.readline()
                size = int(line.split(b";")[0], 16)
                parts += [line, self.rfile.read(size + 2)]
                if not size:
                    return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        reset(self.connection)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("transfer-encoding", "connection", "content-length") or (
                key.lower() == "content-length" and self.command == "HEAD"
            ):
                self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            drip(self.wfile, body)
        elif fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._reset()
        else:
            self.wfile.write(body)
