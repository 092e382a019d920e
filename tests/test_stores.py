"""What the clients of object stores are given: a URL that reads what was written, uploads that any server takes."""

import datetime
import ipaddress
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.stores import is_remote, plain_uploads, readable, status_of
from convert.store import Store
from tests.convert.s3_server import S3Server
from train.remote import download


def test_a_container_of_azure_is_read_where_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", "ours")
    assert readable("azure://box/shards/one/index.json") == "azure://ours/box/shards/one/index.json"
    long = "azure://ours.blob.core.windows.net/box/shards"
    assert [readable(url) for url in (long, "s3://box/shards", "gs://box/shards")] == [
        long,
        "s3://box/shards",
        "gs://box/shards",
    ]
    monkeypatch.delenv("AZURE_ACCOUNT_NAME")
    with pytest.raises(ValueError, match="azure://box needs the environment variable AZURE_ACCOUNT_NAME"):
        readable("azure://box/shards")


def test_an_address_is_told_from_a_path() -> None:
    addresses = [
        "s3://box/a",
        "azure-dl://box/a",
        "dbfs:/Volumes/main/default/a",
        "hf://datasets/me/a",
        "file:///mnt/a",
    ]
    paths = ["data/shards", "/mnt/s3://a", "./s3:a", "C:/shards", "runs/a:/b", ""]
    assert [place for place in [*addresses, *paths] if is_remote(place)] == addresses


@pytest.mark.parametrize("url", ["s3://box/a#b", "gs://box/a?b=c", "hf://datasets/me/a\nb"])
def test_an_address_whose_path_the_clients_would_cut_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="an address holds `\\?`, `#` or a line break"):
        is_remote(url)
    assert not is_remote(url.replace("://", "/"))


def test_a_hub_out_of_reach_is_not_taken_for_an_empty_one() -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert status_of(FileNotFoundError("no such object")) == 404
    assert status_of(LocalEntryNotFoundError("cannot reach the hub")) is None


def test_amazon_keeps_its_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "GCS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", environment := {})
    plain_uploads()
    assert environment == {}


def test_a_server_over_tls_takes_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tmp_path / "s3", tls=certificate(tmp_path / "tls.pem")) as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "")
        monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
        (tmp_path / "file").write_bytes(b"tokens" * 1000)
        store = Store("s3://bucket/a/b", tmp_path / "scratch", 1)
        store.put(tmp_path / "file", "c/shard.mds")
        assert store.get("c/shard.mds") == b"tokens" * 1000
        download("s3://bucket/a/b/c/shard.mds", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"tokens" * 1000


def certificate(path: Path) -> Path:
    """A certificate of this machine's loopback address, signed by itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(signed.public_bytes(encoding) + key.private_bytes(encoding, form, serialization.NoEncryption()))
    return path
