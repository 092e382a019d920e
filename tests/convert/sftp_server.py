"""A real SFTP server (`rclone serve sftp`) on loopback, that can be restarted."""

from pathlib import Path
from typing import TypeVar

from paramiko import ECDSAKey

from tests.convert.rclone import RcloneServer

Server = TypeVar("Server", bound="SftpServer")


class SftpServer(RcloneServer):
    """Serves the folder `root` to the owner of a key; `environment` is what a client needs. `keys` lies beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.keys = root, root.with_name(f"{root.name} keys")
        root.mkdir()
        self.keys.mkdir()
        public = {}
        for name in ("host", "client", "stranger"):
            key = ECDSAKey.generate()
            key.write_private_key_file(str(self.keys / name))
            public[name] = f"{key.get_name()} {key.get_base64()}\n"
        (self.keys / "authorized").write_text(public["client"])
        super().__init__(
            "sftp", ["--key", str(self.keys / "host"), "--authorized-keys", str(self.keys / "authorized")], root
        )
        (self.keys / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public['host']}")
        self.url = f"sftp://trainer@127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COMPOSER_SFTP_KEY_FILE": str(self.keys / "client"),
            "COMPOSER_SFTP_KNOWN_HOSTS_FILE": str(self.keys / "known_hosts"),
        }

    def __enter__(self: Server) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
