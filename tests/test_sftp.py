"""SFTP servers as a store: a real one that is restarted, and one that does not know us, or that we do not know."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from chimera import sftp, stores
from chimera.cli import UserError
from convert.store import Store
from tests.convert.sftp_server import SftpServer
from train import remote


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
    store = Store(f"{server.url}/a/b c", tmp_path / "scratch", retries=1)
    for data in (b"old", b"new " * 100_000):
        (tmp_path / "file").write_bytes(data)
        store.put(tmp_path / "file", "en/index.json")
    place = server.root / "a" / "b c" / "en" / "index.json"
    assert place.read_bytes() == data
    with monkeypatch.context() as patch:  # a machine that is gone once the bytes are there
        patch.setattr("paramiko.SFTPClient.posix_rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        (tmp_path / "file").write_bytes(b"newer")
        with pytest.raises(KeyboardInterrupt):
            store.put(tmp_path / "file", "en/index.json")
    assert place.read_bytes() == data
    store.put(tmp_path / "file", "en/index.json")
    assert [path.name for path in place.parent.iterdir()] == ["index.json"]
    assert store.can_delete
    for _ in range(2):
        store.delete("en/index.json")
    assert store.get("en/index.json") is None


def test_a_server_that_restarts_is_connected_to_again(server: SftpServer, tmp_path: Path) -> None:
    store = Store(f"{server.url}/shards", tmp_path / "scratch", retries=3)
    (tmp_path / "file").write_bytes(b"text")
    store.put(tmp_path / "file", "one")
    remote.download(f"{server.url}/shards/one", tmp_path / "copy")
    server.stop()
    server.start()
    store.put(tmp_path / "file", "two")
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
        Store(f"{server.url}/shards", tmp_path / "scratch", retries=3).get("manifest.json")
    with pytest.raises(OSError, match="access denied" if "Authentication" in said else said):
        remote.download(f"{server.url}/shards/manifest.json", tmp_path / "file")


def test_a_server_that_does_not_answer_is_given_up(server: SftpServer, tmp_path: Path) -> None:
    client = sftp.SftpClient(f"{server.url}/shards")
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.download(f"{server.url}/shards/one", str(tmp_path / "file"), 0.5)
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.parametrize("url", ["sftp://me:secret@host/shards", "s3://KEY:secret@bucket/x"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="an address holds a password") as refusal:
        stores.is_remote(url)
    assert "secret" not in str(refusal.value)
