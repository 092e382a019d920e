"""Files from wherever streaming can read: s3://, gs://, azure://, oci://, …, and file:// for a mounted folder."""

import shutil
import threading
import time
from pathlib import Path

from chimera import stores
from chimera.cli import one_line

ATTEMPTS = 3
TIMEOUT = 60.0  # seconds without an answer

_clients = threading.local()  # a thread's downloaders by scheme and host: slow to make, and not to be shared


def download(url: str, to: Path) -> None:
    """Make `to` hold what is at `url`; raises `FileNotFoundError` if nothing is, `OSError` if it cannot be read.

    A failure is tried again twice. The message never holds more than the backend's own words.
    """
    if url.startswith("file:"):
        shutil.copyfile("/" + url.removeprefix("file:").lstrip("/"), to)  # one slash or three
        return
    host = "/".join(url.split("/", 3)[:3])
    for attempt in range(1, ATTEMPTS + 1):
        try:
            clients = _clients.__dict__
            if host not in clients:
                clients[host] = stores.downloader(url)
            stores.download(clients[host], url, to, TIMEOUT)
            return
        except Exception as error:  # every backend has its own kinds
            what = f"{type(error).__name__}: {one_line(error)[:300]}"
            status = stores.status_of(error)
            if status in (401, 403):  # streaming's words for it may be "not found"
                raise OSError(f"access denied ({status}): check the credentials and their permissions") from None
            if status == 404:
                raise FileNotFoundError(what) from None
            if attempt == ATTEMPTS or isinstance(error, ImportError | ValueError):
                raise OSError(what) from None
            forget_clients()
            time.sleep(2.0 ** (attempt - 1))


def forget_clients() -> None:
    """Make new clients from now on in this thread (their settings come from the environment)."""
    _clients.__dict__.clear()
