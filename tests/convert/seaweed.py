"""A real S3 server that honors conditional creates (SeaweedFS) on loopback; it reports to nobody."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

PORTS = ("s3", "master", "volume", "filer")


class SeaweedServer:
    """Makes buckets when they are written to, in files of its own below `root`; speaks S3 on `port`."""

    def __init__(self, root: Path, key: str, secret: str) -> None:
        who = {"accessKey": key, "secretKey": secret}
        rights = ["Admin", "Read", "Write", "List"]
        (root / "s3.json").write_text(
            json.dumps({"identities": [{"name": "us", "credentials": [who], "actions": rights}]})
        )
        ports = _free_ports(2 * len(PORTS))
        self.port = ports[0]
        flags = [f"-{name}.port={ports.pop(0)}" for name in PORTS]
        flags += [f"-{name}.port.grpc={ports.pop(0)}" for name in PORTS]
        flags += [f"-{name}.localSocket={root}/{name}.sock" for name in ("filer", "s3")]
        command = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
        self._process = subprocess.Popen(
            [
                command, "server", f"-dir={root}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
                "-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3", f"-s3.config={root}/s3.json",
                "-s3.port.iceberg=0", "-s3.port.lance=0", *flags,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=2).close()
                break
            assert self._process.poll() is None, "weed did not start: it comes with the `test` extra"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
