"""Objects of real S3 servers, one that honors conditional creates and one that does not, and what is refused."""

import datetime
import ipaddress
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.objects import Objects, split
from chimera.objects_obstore import ObstoreClient
from chimera.stores import StoreError, attempt, is_remote, plain_uploads
from tests.convert.loopback import LoopbackHandler, LoopbackServer
from tests.convert.s3_server import S3Server

KEY = re.compile("CHIMERATESTKEYID0001|forty|wrong-secret")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, S3Server]]:
    folder = tmp_path_factory.mktemp("servers")
    with S3Server(folder / "rclone") as plain, S3Server(folder / "seaweed", seaweed=True) as seaweed:
        yield {"rclone": plain, "seaweed": seaweed}


@pytest.fixture(params=["rclone", "seaweed"])
def s3(request: pytest.FixtureRequest, servers: dict[str, S3Server], monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for key, value in servers[request.param].environment.items():
        monkeypatch.setenv(key, value)
    return servers[request.param]


@pytest.mark.usefixtures("s3")
def test_what_is_written_is_read_whole_in_part_and_into_a_file(tmp_path: Path) -> None:
    store = Objects("s3://bucket/a b/perçent%20", 1)
    for data in (b"old", b"token" * 999):
        store.put("en/x+y=z", data)
    assert store.get("en/x+y=z") == data
    assert store.get_range("en/x+y=z", 3, 12) == data[3:12]
    assert store.get_range("en/x+y=z", 4990, 9999) == data[4990:]
    assert store.get_range("en/x+y=z", 5, 5) == b""
    assert store.head("en/x+y=z").size == len(data)
    assert store.head("en/x+y=z").etag == store.list("en")[0].etag is not None
    store.fetch("en/x+y=z", tmp_path / "new" / "copy")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("copy", data)]
    store.delete("en/x+y=z")
    store.delete("en/x+y=z")
    assert (store.find("en/x+y=z"), store.exists("en/x+y=z"), store.list()) == (None, False, [])
    for read in (store.get, store.head, lambda key: store.fetch(key, tmp_path / "none")):
        with pytest.raises(FileNotFoundError):
            read("en/x+y=z")
    assert not (tmp_path / "none").exists()


def test_a_large_file_goes_up_in_parts(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data := os.urandom(20 << 20))
    Objects("s3://bucket/large", 1).put("file", tmp_path / "file")
    assert Objects("s3://bucket/large").get("file") == data
    assert len([line for line in s3.requests if "partNumber=" in line and "large" in line]) == 3


@pytest.mark.parametrize("s3", ["rclone"], indirect=True)
def test_a_listing_has_more_than_a_page(s3: S3Server) -> None:
    names = [f"{number % 7}/{number:04}" for number in range(1030)]
    s3.stop()  # it keeps in mind which files there are
    for name in (*names, "7."):  # as files of the server's, which is faster than to upload them
        file = s3.root / "bucket/many" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"1")
    s3.start()
    store = Objects("s3://bucket/many", 1)
    assert [entry.key for entry in store.list()] == sorted([*names, "7."])
    assert [entry.key for entry in store.list("3")] == sorted(name for name in names if name.startswith("3/"))


def test_an_object_is_created_once_where_the_store_can(s3: S3Server, servers: dict[str, S3Server]) -> None:
    store = Objects("s3://bucket/once", 1)
    honored = s3 is servers["seaweed"]
    assert [store.put_if_absent("x", data) for data in (b"one", b"two")] == [True, not honored]
    assert store.get("x") == (b"one" if honored else b"two")


def test_of_many_creators_one_succeeds(servers: dict[str, S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in servers["seaweed"].environment.items():
        monkeypatch.setenv(key, value)
    stores = [Objects("s3://bucket/claims", 1) for _ in range(6)]
    together = threading.Barrier(6)

    def create(writer: int, key: str) -> bool:
        together.wait(60)
        return stores[writer].put_if_absent(key, f"writer {writer}".encode())

    for number in range(4):
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6), [str(number)] * 6))
        assert [writer for writer in range(6) if won[writer]] == [int(stores[0].get(str(number))[-1:])]


def test_no_change_of_many_writers_is_lost(servers: dict[str, S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in servers["seaweed"].environment.items():
        monkeypatch.setenv(key, value)

    def add(name: str) -> bytes:
        def change(found: bytes | None) -> bytes:
            names = {*(found or b"").decode().split(), name}
            return " ".join(sorted(names)).encode()

        return Objects("s3://bucket/merged", 6).update("names", change)

    names = [f"{number:02d}" for number in range(20)]
    with ThreadPoolExecutor(5) as pool:
        got = [*pool.map(add, names)]
    assert all(name.encode() in each for name, each in zip(names, got, strict=True))
    assert Objects("s3://bucket/merged", 1).get("names") == " ".join(names).encode()


def test_a_change_whose_answer_is_lost_is_made_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    del s3
    real, store = ObstoreClient.swap, Objects("s3://bucket/lost", 2)
    store.put("n", b"1")

    def lose_answer(self: ObstoreClient, path: str, data: bytes, etag: str | None) -> bool:
        monkeypatch.setattr(ObstoreClient, "swap", real)
        real(self, path, data, etag)
        raise ConnectionError("reset")

    monkeypatch.setattr(ObstoreClient, "swap", lose_answer)
    assert store.update("n", lambda found: b"1 2" if found in (b"1", b"1 2") else b"?") == b"1 2"
    assert store.get("n") == b"1 2"


def test_a_claim_whose_answer_is_lost_is_known_as_ours(servers: dict[str, S3Server], monkeypatch: Any) -> None:
    for key, value in servers["seaweed"].environment.items():
        monkeypatch.setenv(key, value)
    real = ObstoreClient.create

    def lose_answer(self: ObstoreClient, path: str, data: bytes) -> bool:
        monkeypatch.setattr(ObstoreClient, "create", real)
        real(self, path, data)
        raise ConnectionError("reset")

    monkeypatch.setattr(ObstoreClient, "create", lose_answer)
    assert Objects("s3://bucket/lost", 2).put_if_absent("claim", b"ours")
    assert not Objects("s3://bucket/lost", 2).put_if_absent("claim", b"theirs")


@pytest.mark.usefixtures("s3")
def test_wrong_credentials_are_told_at_once_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    store = Objects("s3://bucket/a", 3)
    for act in (store.get, store.head, store.delete, store.list, lambda key: store.put(key, b"1")):
        with pytest.raises(
            StoreError, match=r"s3://bucket/a/x failed after 1 attempt: .*credentials \(HTTP 403; "
        ) as e:
            act("x")
        assert not KEY.search(str(e.value))
        assert "\n" not in str(e.value)


def test_a_busy_server_is_asked_again_and_given_up(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    Objects("s3://bucket/busy", 1).put("x", b"1")
    s3.errors = 1
    assert Objects("s3://bucket/busy", 2).get("x") == b"1"
    assert "attempt 2 of 2 in 1 s" in capsys.readouterr().err
    s3.errors = 2
    with pytest.raises(StoreError, match="read of s3://bucket/busy/x failed after 2 attempts: 503 "):
        Objects("s3://bucket/busy", 2).get("x")


@pytest.mark.parametrize("root", ["s3://bucket/a", "https://{}/a", "sftp://who@{}/a"])
def test_a_server_that_is_not_there_is_given_up_soon_with_its_address_and_the_cause(
    monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StoreError, match=f"after 1 attempt: .*{port}.*: Connection refused: ") as error:
            Objects(root.format(f"127.0.0.1:{port}"), 9, opening=1).get("x")
        assert "127.0.0.1" in str(error.value)


def test_a_server_that_has_answered_is_waited_for(s3: S3Server) -> None:
    store = Objects("s3://bucket/came", 2, opening=1)
    s3.errors = 1
    with pytest.raises(StoreError, match="after 1 attempt: 503 "):
        store.find("x")
    assert store.find("x") is None
    s3.errors = 1
    assert store.find("x") is None


@pytest.mark.usefixtures("s3")
def test_a_forked_process_reads_by_another_and_does_nothing_else() -> None:
    store = Objects("s3://bucket/forked", 1)
    store.put("x", b"text" * 9)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # one that hangs
        code = 1
        try:
            fresh = Objects("s3://bucket/forked", 1)
            assert store.get("x") == b"text" * 9
            assert fresh.get_range("x", 1, 4) == b"ext"
            assert fresh.find("none") is None
            with pytest.raises(StoreError, match="can only read objects"):
                store.put("y", b"1")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert store.find("y") is None


def test_a_file_over_https_is_read() -> None:
    class Handler(LoopbackHandler):
        def do_GET(self) -> None:
            self.send(200 if self.path == "/a%20b/x" else 404, b"page", {"Last-Modified": formatdate(usegmt=True)})

    with LoopbackServer(Handler) as server:
        assert Objects(f"{server.url}/a b", 1).get("x") == b"page"
        assert Objects(f"{server.url}/a b", 1).find("y") is None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AZURE_ACCOUNT_NAME", "GCS_KEY", "OCIFS_IAM_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    for url, said in {
        "azure://box/a": "azure://box needs the environment variable AZURE_ACCOUNT_NAME",
        "gs://box/a": "gs://box needs GOOGLE_APPLICATION_CREDENTIALS",
        "oci://box@us/a": "oci://box@us needs ~/.oci/config",
        "alipan:///a": "is not an address that can be read: take a folder, s3://",
        "dbfs:/Volumes/a/b/c": "is not an address that can be read: take a folder, s3://",
    }.items():
        with pytest.raises(StoreError, match=f"after 1 attempt: .*{said}"):
            Objects(url, 3).get("x")


@pytest.mark.parametrize(
    "url", ["localhost:9000", "notaurl", "http://127.0.0.1:99999", "http://user:secret@127.0.0.1:9"]
)
def test_an_endpoint_that_is_none_is_refused_without_its_secret(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Of such addresses obstore makes a panic, which no `except Exception` sees."""
    monkeypatch.setenv("S3_ENDPOINT_URL", url)
    with pytest.raises(UserError, match="the endpoint that the environment gives is no address") as error:
        Objects("s3://box/a", 1).get("x")
    assert "secret" not in str(error.value)


def test_a_password_in_an_address_is_not_repeated() -> None:
    def fail() -> None:
        raise OSError("GET http://user:sec/ret@127.0.0.1:9/box/a failed")

    with pytest.raises(StoreError, match=r"GET http://127\.0\.0\.1:9/box/a failed"):
        attempt("read", fail, 1)


def test_a_signature_in_an_address_is_not_repeated() -> None:
    def fail() -> None:
        raise OSError("PUT https://ours.blob.core.windows.net/box/a?sv=2024&sig=SECRET failed")

    with pytest.raises(StoreError) as error:
        attempt("upload", fail, 1)
    assert "box/a failed" in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "place", "path"),
    [
        ("s3://box/a/b", "s3://box", "a/b"),
        ("azure://box/a", "azure://box", "a"),
        ("azure://ours.blob.core.windows.net/box/a/b", "azure://ours.blob.core.windows.net/box", "a/b"),
        ("hf://datasets/me/set/a", "hf://datasets/me/set", "a"),
        ("sftp://me@host:22/a/", "sftp://me@host:22", "a"),
    ],
)
def test_a_place_is_told_from_the_path_in_it(url: str, place: str, path: str) -> None:
    assert split(url) == (place, path)


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


def test_a_hub_out_of_reach_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="read of hf://datasets/me/set/x failed"):
        Objects("hf://datasets/me/set", 1).find("x")


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
        store = Objects("s3://bucket/a/b", 1)
        store.put("c/shard.mds", tmp_path / "file")
        assert store.get("c/shard.mds") == b"tokens" * 1000


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
