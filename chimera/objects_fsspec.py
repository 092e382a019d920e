"""Stores that obstore does not reach: the hub's sets and Oracle's by `fsspec`, SFTP servers by paramiko."""

import contextlib
import logging
import os
import posixpath
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chimera.cli import UserError
from chimera.objects_client import PIECE, Client, Entry, Unconditional


def connect(place: str, seconds: float) -> Client:
    """The client of `hf://datasets/OWNER/NAME`, `sftp://USER@HOST:PORT` or `oci://BUCKET@NAMESPACE`."""
    scheme, _, name = place.partition("://")
    if scheme == "sftp":
        return SftpClient(place, seconds)
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return FsspecClient(HfFileSystem(skip_instance_cache=True, use_listings_cache=False), name)
    from ocifs import OCIFileSystem

    config = None if os.environ.get("OCIFS_IAM_TYPE") else "~/.oci/config"
    try:
        return FsspecClient(OCIFileSystem(config, profile="DEFAULT", skip_instance_cache=True), name)
    except Exception as error:  # of a dozen kinds
        raise UserError(f"{place} needs ~/.oci/config, or OCIFS_IAM_TYPE: {error}") from None


class FsspecClient(Unconditional):
    """What is below the folder `root` of a file system of fsspec's; one that keeps listings is told to forget them."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        self._system.invalidate_cache()
        if start or end is not None:
            yield self._system.cat_file(self._at(path), start=start, end=end)
            return
        with self._system.open(self._at(path), "rb", block_size=0) as file:  # for the hub: one request
            while piece := file.read(PIECE):
                yield piece

    def head(self, path: str) -> Entry:
        self._system.invalidate_cache()
        found = self._system.info(self._at(path))
        if found["type"] == "directory":
            raise FileNotFoundError(path)
        return Entry(path, found["size"], _tag(found))

    def list(self, folder: str) -> Iterator[Entry]:
        self._system.invalidate_cache()
        below = len(self._at("")) + 1
        try:
            names = self._system.find(self._at(folder), detail=True)
        except FileNotFoundError:
            return  # no such folder
        for name, found in names.items():
            yield Entry(name.strip("/")[below:], found["size"], _tag(found))

    def write(self, path: str, source: Path | bytes) -> None:
        if isinstance(source, bytes):
            self._system.pipe_file(self._at(path), source)
        else:
            self._system.put_file(str(source), self._at(path))

    def create(self, path: str, data: bytes) -> bool:
        """Two steps: another may write between them."""
        self._system.invalidate_cache()
        if self._system.exists(self._at(path)):
            return False
        self.write(path, data)
        return True

    def delete(self, path: str) -> None:
        self._system.invalidate_cache()
        if self._system.exists(self._at(path)):  # on the hub a removal is a commit
            self._system.rm_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")


def _tag(found: dict[str, Any]) -> str | None:
    return found.get("etag") or found.get("blob_id")


class SftpClient(Unconditional):
    """An SFTP server, whose key must be known: fsspec's client takes any server's, and waits for one without end.

    Raises `UserError` where the key or the server's is not as it should be, and what paramiko does.
    """

    def __init__(self, place: str, seconds: float) -> None:
        self._connection = _login(place, seconds)  # to keep: the session below ends with it
        self._session = self._connection.open_sftp()
        self._session.get_channel().settimeout(seconds)

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with self._session.open(f"/{path}", "rb") as file:
            size = file.stat().st_size
            left = (size if end is None else min(end, size)) - start
            if start == 0 and end is None:
                file.prefetch(size)
            file.seek(start)
            while left > 0 and (piece := file.read(min(left, PIECE))):
                yield piece
                left -= len(piece)

    def head(self, path: str) -> Entry:
        found = self._session.stat(f"/{path}")
        if _is_folder(found):
            raise FileNotFoundError(path)
        return Entry(path, found.st_size, f"{found.st_mtime}-{found.st_size}")

    def list(self, folder: str) -> Iterator[Entry]:
        try:
            names = self._session.listdir_attr(f"/{folder}")
        except FileNotFoundError:
            return
        for found in names:
            path = f"{folder}/{found.filename}".lstrip("/")
            if _is_folder(found):
                yield from self.list(path)
            else:
                yield Entry(path, found.st_size, f"{found.st_mtime}-{found.st_size}")

    def write(self, path: str, source: Path | bytes) -> None:
        """Under another name first, so that no half of it is ever found."""
        part = f"/{path}.part"
        self._send(part, source)
        self._session.posix_rename(part, f"/{path}")

    def create(self, path: str, data: bytes) -> bool:
        """A rename that replaces nothing, where the server keeps to that (OpenSSH's does)."""
        part = f"/{path}.{secrets.token_hex(4)}.part"
        self._send(part, data)
        try:
            self._session.rename(part, f"/{path}")
        except OSError:
            self._session.stat(f"/{path}")  # or the server was not up to it
            self._session.remove(part)
            return False
        return True

    def delete(self, path: str) -> None:
        """Also the half of it a killed upload left."""
        for place in (f"/{path}", f"/{path}.part"):
            with contextlib.suppress(FileNotFoundError):
                self._session.remove(place)

    def _send(self, place: str, source: Path | bytes) -> None:
        self._make_folder(posixpath.dirname(place))
        if isinstance(source, Path):
            self._session.put(str(source), place)
        else:
            with self._session.open(place, "wb") as file:
                file.write(source)

    def _make_folder(self, folder: str) -> None:
        try:
            self._session.stat(folder)
        except FileNotFoundError:
            self._make_folder(posixpath.dirname(folder))
            with contextlib.suppress(OSError):  # another worker made it meanwhile; if none did, `put` says so
                self._session.mkdir(folder)


def _is_folder(found: Any) -> bool:
    return stat.S_ISDIR(found.st_mode)


def _login(root: str, seconds: float) -> Any:
    """An SSH connection to the server of `root`."""
    from paramiko import BadHostKeyException, PKey, SSHClient, SSHException
    from paramiko.ssh_exception import NoValidConnectionsError

    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it also prints what it raises
    place, connection = urlsplit(root), SSHClient()
    key, hosts = (os.environ.get(f"COMPOSER_SFTP_{name}_FILE") for name in ("KEY", "KNOWN_HOSTS"))
    try:
        connection.load_system_host_keys(hosts)
    except OSError as error:
        raise UserError(f"the environment variable COMPOSER_SFTP_KNOWN_HOSTS_FILE: {hosts}: {error.strerror}") from None
    try:
        private = PKey.from_path(key) if key else None
    except (OSError, SSHException, TypeError, ValueError) as error:
        raise UserError(
            f"the environment variable COMPOSER_SFTP_KEY_FILE: {key} is not a private key without a passphrase: {error}"
        ) from None
    try:
        connection.connect(
            place.hostname or "", place.port or 22, place.username, pkey=private,
            timeout=seconds, banner_timeout=seconds, auth_timeout=seconds, channel_timeout=seconds,
        )  # fmt: skip
    except SSHException as error:
        if isinstance(error, BadHostKeyException) or "known_hosts" in str(error):
            raise UserError(
                f"{error}: put the server's key into ~/.ssh/known_hosts (`ssh-keyscan` shows it), or the file of "
                "COMPOSER_SFTP_KNOWN_HOSTS_FILE"
            ) from None
        raise
    except NoValidConnectionsError as error:
        raise ConnectionError(f"{error}: {next(iter(error.errors.values())).strerror}") from None
    connection.get_transport().set_keepalive(30)
    return connection
