"""SFTP servers, by the interfaces of streaming's uploaders and downloaders.

Streaming (0.13.0) reads from SFTP servers but has no uploader for them; its downloader waits without end, and calls a
key the server refuses a file of the wrong kind. The settings are its own.
"""

import contextlib
import logging
import os
import posixpath
from typing import Any
from urllib.parse import urlsplit

SECONDS = 60.0  # without an answer


class SftpClient:
    """A connection to `sftp://USER@HOST:PORT/PATH`; files are written into the folder PATH from the folder `local`.

    Raises `ValueError` where the key or the server's is not as it should be, and what paramiko does.
    """

    def __init__(self, root: str, local: str = "") -> None:
        self.local, self._folder = local, _path(root)
        self._connection = _login(root)  # to keep: the session below ends with it
        self._session = self._connection.open_sftp()
        self._session.get_channel().settimeout(SECONDS)

    def upload_file(self, filename: str) -> None:
        """`local/filename` to `PATH/filename`: under another name first, so that no half of it is ever found."""
        place = f"{self._folder}/{filename}"
        self._make_folder(posixpath.dirname(place))
        self._session.put(f"{self.local}/{filename}", f"{place}.part")
        self._session.posix_rename(f"{place}.part", place)

    def delete_file(self, filename: str) -> None:
        """Remove `PATH/filename`, and the half of it a killed upload left, where there are any."""
        for place in (f"{self._folder}/{filename}", f"{self._folder}/{filename}.part"):
            with contextlib.suppress(FileNotFoundError):
                self._session.remove(place)

    def download(self, url: str, to: str, seconds: float) -> None:
        """What is at `url`, on this server, into the file `to`; raises `FileNotFoundError` where nothing is."""
        self._session.get_channel().settimeout(seconds)
        self._session.get(_path(url), to)

    def _make_folder(self, folder: str) -> None:
        try:
            self._session.stat(folder)
        except FileNotFoundError:
            self._make_folder(posixpath.dirname(folder))
            with contextlib.suppress(OSError):  # another worker made it meanwhile; if none did, `put` says so
                self._session.mkdir(folder)


def _path(url: str) -> str:
    return "/" + url.partition("://")[2].partition("/")[2]


def _login(root: str) -> Any:
    """An SSH connection to the server of `root`."""
    from paramiko import BadHostKeyException, PKey, SSHClient, SSHException

    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it also prints what it raises
    place, connection = urlsplit(root), SSHClient()
    key, hosts = (os.environ.get(f"COMPOSER_SFTP_{name}_FILE") for name in ("KEY", "KNOWN_HOSTS"))
    try:
        connection.load_system_host_keys(hosts)
    except OSError as error:
        raise ValueError(
            f"the environment variable COMPOSER_SFTP_KNOWN_HOSTS_FILE: {hosts}: {error.strerror}"
        ) from None
    try:
        private = PKey.from_path(key) if key else None
    except (OSError, SSHException, TypeError, ValueError) as error:
        raise ValueError(
            f"the environment variable COMPOSER_SFTP_KEY_FILE: {key} is not a private key without a passphrase: {error}"
        ) from None
    try:
        connection.connect(
            place.hostname or "", place.port or 22, place.username, pkey=private,
            timeout=SECONDS, banner_timeout=SECONDS, auth_timeout=SECONDS, channel_timeout=SECONDS,
        )  # fmt: skip
    except SSHException as error:
        if isinstance(error, BadHostKeyException) or "known_hosts" in str(error):
            raise ValueError(
                f"{error}: put the server's key into ~/.ssh/known_hosts (`ssh-keyscan` shows it), or the file of "
                "COMPOSER_SFTP_KNOWN_HOSTS_FILE"
            ) from None
        raise
    connection.get_transport().set_keepalive(30)
    return connection
