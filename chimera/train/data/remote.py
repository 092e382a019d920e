"""Files from object stores, and from file:// for a mounted folder."""

import shutil
import threading
from pathlib import Path

from chimera.objects import Objects, split

_clients = threading.local()  # a thread's, by bucket or host: slow to make, and not to be shared


def download(url: str, to: Path) -> None:
    """Make `to` hold what is at `url`; raises `FileNotFoundError` if nothing is, `OSError` if it cannot be read."""
    if url.startswith("file:"):
        shutil.copyfile("/" + url.removeprefix("file:").lstrip("/"), to)  # one slash or three
        return
    place, path = split(url)
    clients = _clients.__dict__
    if place not in clients:
        clients[place] = Objects(place)
    clients[place].fetch(path, to)


def forget_clients() -> None:
    """Forget this thread's clients, so that new ones read the environment again."""
    _clients.__dict__.clear()
