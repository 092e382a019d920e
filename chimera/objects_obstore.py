"""Stores that `obstore` speaks to: s3, gs, azure, https; settings come from the variables their usual clients read."""

import datetime
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from chimera.cli import UserError
from chimera.objects_client import PIECE, Entry
from chimera.stores import status_of

READ = """
import json, sys
place, seconds, *asked = json.loads(sys.argv[1])
sys.path[:] = sys.argv[2:]
from chimera.objects_obstore import ObstoreClient
try:
    for piece in ObstoreClient(place, seconds).read(*asked):
        sys.stdout.buffer.write(piece)
    sys.stdout.flush()
except Exception as error:
    sys.exit(str(error))
"""
PART = 8 << 20  # bytes of an upload in parts
PARTS = 4  # of them under way at a time: read_timeout counts while one is sent
MOST_PARTS = 9_000  # a store takes 10 000
RENEWAL = datetime.timedelta(minutes=5)  # how long credentials are used that somebody else renews

_used = _forked = False  # whether this process has called obstore; whether that was before it was forked


def _after_fork() -> None:
    """Obstore's threads do not come along to a forked process (a DataLoader's): its calls would wait there for ever."""
    global _forked
    _forked = _used


os.register_at_fork(after_in_child=_after_fork)


class ObstoreClient:
    """One bucket, container or host: `s3://BUCKET`, `gs://BUCKET`, `azure://CONTAINER`, `https://HOST`."""

    def __init__(self, place: str, seconds: float) -> None:
        self._place, self._seconds = place, seconds

    @property
    def _store(self) -> Any:
        global _used
        if _forked:
            raise RuntimeError("a process that was forked from one that uses stores can only read objects")
        _used = True
        return self._made

    @functools.cached_property
    def _made(self) -> Any:
        scheme, _, name = self._place.partition("://")
        make: Any = {"s3": _s3, "gs": _gs, "azure": _azure, "azure-dl": _azure}.get(scheme)
        client: Any = {
            "timeout": "1d",  # of a whole request; what counts is that something comes
            "read_timeout": f"{self._seconds:g}s",
            "connect_timeout": f"{min(self._seconds, 20):g}s",
        }
        # no attempts of its own: `stores.attempt` is the policy
        once: Any = {"max_retries": 0, "retry_timeout": datetime.timedelta(days=1)}
        if make is None:
            client["allow_http"] = scheme == "http"
            return HTTPStore.from_url(self._place, client_options=client, retry_config=once)
        return make(name, client, once)

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if _forked:
            yield from _read_elsewhere([self._place, self._seconds, path, start, end])
            return
        if start == 0 and end is None:
            yield from map(bytes, self._store.get(path).stream(min_chunk_size=PIECE))
            return
        size = None if end is None else end - start
        if size == 0:
            return
        try:
            asked = {"range": (start, end)} if end is not None else {"range": {"offset": start}}
            yield bytes(self._store.get(path, options=asked).bytes())
        except GenericError as error:
            if "non-partial response" not in str(error):
                raise
            yield from _cut(self.read(path), start, end)  # rclone's server gives the whole for some ranges

    def head(self, path: str) -> Entry:
        found = self._store.head(path)
        return Entry(path, found["size"], _tag(found))

    def list(self, folder: str) -> Iterator[Entry]:
        for page in self._store.list(folder or None, chunk_size=1000):
            yield from (Entry(found["path"], found["size"], _tag(found)) for found in page)

    def write(self, path: str, source: Path | bytes) -> None:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        part = max(PART, -(-size // MOST_PARTS))
        self._store.put(path, source, chunk_size=part, max_concurrency=PARTS, use_multipart=size > part)

    def create(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, "create")

    def swap(self, path: str, data: bytes, etag: str | None) -> bool:
        found = self._store.head(path)
        if _tag(found) != etag:
            return False
        return self._put_if(path, data, {key: found[key] for key in ("e_tag", "version") if found[key]})

    def _put_if(self, path: str, data: bytes, mode: Any) -> bool:
        """Write an object on obstore's condition, without one where the store knows none; returns whether it held."""
        try:
            self._store.put(path, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except Exception as error:
            if status_of(error) not in (400, 501):
                raise
            self._store.put(path, data, use_multipart=False)
        return True

    def delete(self, path: str) -> None:
        self._store.delete(path)


def _read_elsewhere(asked: list[Any]) -> Iterator[bytes]:
    """What `ObstoreClient(place, seconds).read(path, start, end)` gives, read by a new process."""
    command = [sys.executable, "-c", READ, json.dumps(asked), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stderr is not None
        while piece := other.stdout.read(PIECE):
            yield piece
        said = other.stderr.read().decode(errors="replace")
    if other.returncode:
        raise OSError(said or f"a process that reads for this one ended with {other.returncode}")


def _tag(found: Any) -> str | None:
    """An object's tag, which some servers put in quotes at one request and not at another."""
    return (found["e_tag"] or "").strip('"') or None


def _cut(pieces: Iterator[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """Bytes [start, end) of what comes in pieces."""
    at = 0
    for piece in pieces:
        yield piece[max(0, start - at) : None if end is None else max(0, end - at)]
        at += len(piece)
        if end is not None and at >= end:
            return


def _s3(bucket: str, client: Any, retry: Any) -> S3Store:
    """As boto3: its variables, profiles and roles; without any of them the requests go unsigned, for public buckets."""
    import botocore.session
    from botocore.credentials import RefreshableCredentials

    session = botocore.session.get_session()
    region = session.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"
    config: Any = {"bucket": bucket, "region": region, "disable_bulk_delete": True}
    names = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    _set_endpoint(config, client, next(filter(None, map(os.environ.get, names)), None))
    if certificates := session.get_config_variable("ca_bundle"):
        client["root_certificate"] = _text_of(certificates, "AWS_CA_BUNDLE")
    if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").replace(" ", "").split(","):
        config["request_payer"] = True
    found = session.get_credentials()
    if found is None:
        return S3Store(config={**config, "skip_signature": True}, client_options=client, retry_config=retry)

    def provide() -> Any:
        now = found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": _soon() if isinstance(found, RefreshableCredentials) else None,
        }

    return S3Store(config=config, client_options=client, retry_config=retry, credential_provider=provide)


def _gs(bucket: str, client: Any, retry: Any) -> S3Store | GCSStore:
    """With `GCS_KEY` and `GCS_SECRET` by Google's S3 interface, else as `google-auth` finds credentials."""
    key, secret = os.environ.get("GCS_KEY"), os.environ.get("GCS_SECRET")
    if key and secret:
        config: Any = {"access_key_id": key, "secret_access_key": secret, "bucket": bucket}
        config.update(region="auto", endpoint="https://storage.googleapis.com", disable_bulk_delete=True)
        return S3Store(config=config, client_options=client, retry_config=retry)
    from google.auth import default
    from google.auth.exceptions import DefaultCredentialsError
    from google.auth.transport.requests import Request

    try:
        found, _ = default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except DefaultCredentialsError:
        raise UserError(
            f"gs://{bucket} needs GOOGLE_APPLICATION_CREDENTIALS (a file that is there), or GCS_KEY and GCS_SECRET, in "
            "the environment, or a machine of Google's with a service account"
        ) from None

    def token() -> str:
        if not found.valid:
            found.refresh(Request())
        return str(found.token)

    return GCSStore(bucket, client_options=client, retry_config=retry, credential_provider=_token_of(token))


def _azure(name: str, client: Any, retry: Any) -> AzureStore:
    """`CONTAINER` of the account AZURE_ACCOUNT_NAME, or `ACCOUNT.…/CONTAINER`."""
    host, _, container = name.rpartition("/")
    account = host.partition(".")[0] or os.environ.get("AZURE_ACCOUNT_NAME")
    if not account:
        raise UserError(f"azure://{name} needs the environment variable AZURE_ACCOUNT_NAME")
    config: Any = {"account_name": account, "container_name": container}
    _set_endpoint(config, client, os.environ.get("AZURE_STORAGE_ENDPOINT"))  # an emulator's
    if key := os.environ.get("AZURE_ACCOUNT_ACCESS_KEY"):
        return AzureStore(config={**config, "account_key": key}, client_options=client, retry_config=retry)
    if any(name.startswith("AZURE_STORAGE_") for name in os.environ.keys() - {"AZURE_STORAGE_ENDPOINT"}):
        return AzureStore(config=config, client_options=client, retry_config=retry)  # obstore's own names
    from azure.identity import AzureCliCredential, ChainedTokenCredential, DefaultAzureCredential

    found = ChainedTokenCredential(AzureCliCredential(), DefaultAzureCredential())
    provide = _token_of(lambda: found.get_token("https://storage.azure.com/.default").token)
    return AzureStore(config=config, client_options=client, retry_config=retry, credential_provider=provide)


def _set_endpoint(config: Any, client: Any, url: str | None) -> None:
    if url:
        port = re.fullmatch(r"https?://[^/@\s:?#]+(?::(\d{1,5}))?(/[^@\s?#]*)?", url)  # others make obstore panic
        if not port or int(port[1] or 1) > 65535:
            raise UserError("the endpoint that the environment gives is no address: https://HOST:PORT, without a user")
        config["endpoint"] = url.rstrip("/")
        client["allow_http"] = url.startswith("http://")


def _token_of(token: Callable[[], str]) -> Any:
    """A provider of tokens that are asked for again every few minutes; the library behind it keeps the valid ones."""
    return lambda: {"token": token(), "expires_at": _soon()}


def _soon() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc) + RENEWAL


def _text_of(file: str, variable: str) -> str:
    try:
        return Path(file).read_text()
    except OSError as error:
        raise UserError(f"the environment variable {variable}: {file}: {error.strerror}") from None
