"""SFTP servers as a store: a real one that is restarted, and one that does not know us, or that we do not know."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.objects import Objects
from chimera.objects_fsspec import SftpClient
from chimera.train.data import remote
from tests.convert.sftp_server import SftpServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SftpServer]:
    with SftpServer(tmp_path / "sftp") as running:
        for key, value in running.environment.items():
            monkeypatch.setenv(key, value)
        remote.forget_clients()
        yield running


def test_a_file_replaces_another_only_as_a_whole(
    server: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Objects(f"{server.url}/a/b c", 1)
    for data in (b"old", b"new " * 100_000):
        (tmp_path / "file").write_bytes(data)
        store.put("en/index.json", tmp_path / "file")
    place = server.root / "a" / "b c" / "en" / "index.json"
    assert place.read_bytes() == data
    with monkeypatch.context() as patch:  # a machine that is gone once the bytes are there
        patch.setattr("paramiko.SFTPClient.posix_rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.put("en/index.json", b"newer")
    assert place.read_bytes() == data
    store.put("en/index.json", tmp_path / "file")
    assert [path.name for path in place.parent.iterdir()] == ["index.json"]
    assert store.get_range("en/index.json", 2, 6) == data[2:6]
    assert [(entry.key, entry.size) for entry in store.list()] == [("en/index.json", len(data))]
    for _ in range(2):
        store.delete("en/index.json")
    assert store.find("en/index.json") is None
    assert not store.list("no/such")


def test_a_server_that_restarts_is_connected_to_again(server: SftpServer, tmp_path: Path) -> None:
    store = Objects(f"{server.url}/shards", 3)
    store.put("one", b"text")
    remote.download(f"{server.url}/shards/one", tmp_path / "copy")
    server.stop()
    server.start()
    store.put("two", b"text")
    (tmp_path / "copy").unlink()
    remote.download(f"{server.url}/shards/two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"text"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMPOSER_SFTP_KEY_FILE", "{keys}/stranger", "Authentication failed"),
        ("COMPOSER_SFTP_KEY_FILE", "{keys}/nothing", "COMPOSER_SFTP_KEY_FILE: .*nothing"),
        ("COMPOSER_SFTP_KEY_FILE", "{keys}/authorized", "COMPOSER_SFTP_KEY_FILE: .*authorized is not a private key"),
        ("COMPOSER_SFTP_KNOWN_HOSTS_FILE", "{keys}/nothing", "KNOWN_HOSTS_FILE: .*nothing: No such file"),
        ("COMPOSER_SFTP_KNOWN_HOSTS_FILE", "/dev/null", "not found in known_hosts: put the server's key"),
    ],
)
def test_what_keeps_us_out_is_said_at_once(
    server: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value.format(keys=server.keys))
    with pytest.raises(UserError, match=f"failed after 1 attempt: .*{said}"):
        Objects(f"{server.url}/shards", 3).get("manifest.json")
    with pytest.raises(OSError, match="refuses these credentials" if "Authentication" in said else said):
        remote.download(f"{server.url}/shards/manifest.json", tmp_path / "file")


def test_a_server_that_does_not_answer_is_given_up(server: SftpServer) -> None:
    client = SftpClient(server.url, 0.5)
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.head("shards/one")
    finally:
        server.signal(signal.SIGCONT)
