"""What the pinned clients of object stores need before they read and write."""

import importlib.util
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chimera.cli import UserError, say

URL = re.compile(r"[a-z][a-z0-9-]*:/")  # one slash is enough: `dbfs:/Volumes/...`
PASSWORD = re.compile(r"[a-z][a-z0-9-]*:/+[^/@]*:[^/@]*@")
CUT = re.compile(r"[?#\0-\x1f]")  # where `urlsplit`, and so the clients, end a path: all objects would have one name
# DBFS outside of volumes is left out: streaming's downloader asks for it where Databricks answers for volumes alone.
WRITABLE = re.compile(
    r"(s3|gs|azure|azure-dl|oci)://[^/]+(/.*)?|hf://datasets/[^/]+/[^/]+(/.*)?|dbfs:/Volumes(/[^/]+){3}(/.*)?"
    r"|alipan:///.+|sftp://[^/]+/.+"
)
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
# `a//b`, `/./`, `/../`: servers that tidy up paths send the client elsewhere, which S3's then follows without an end.
UNTIDY = re.compile(r"(?<=[^:/])//+[^/]|/\.{1,2}(/|$)")
REFUSALS = {  # databricks-sdk's and alipcs_py's words for HTTP statuses
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_DOES_NOT_EXIST": 404,
    "InvalidParameter.RefreshToken": 401,
}


def is_remote(place: str) -> bool:
    """Whether `place` is a URL (`file://` too) rather than a path.

    Raises `UserError` for one with a password, which logs and manifests would show, and for one the clients cut.
    """
    if PASSWORD.match(place):
        raise UserError(
            "an address holds a password: take it out; docs/clusters.md says where credentials go (for sftp:// a key)"
        )
    if URL.match(place) and CUT.search(place):
        raise UserError("an address holds `?`, `#` or a line break, and clients of stores read no further: take it out")
    return URL.match(place) is not None


def check_writable(url: str, where: str = "setting `output`") -> None:
    """Raise `UserError`, naming where the URL is given, for one no build can write to."""
    if not WRITABLE.fullmatch(url) or UNTIDY.search(url):
        raise UserError(
            f"{where}: {url} is not an address to write to: take a folder, s3://, gs://, azure://, "
            "azure-dl:// or oci:// with a bucket, hf://datasets/OWNER/NAME/PATH, "
            "dbfs:/Volumes/CATALOG/SCHEMA/VOLUME/PATH, alipan:///PATH, or sftp://USER@HOST/PATH"
        )


def readable(url: str) -> str:
    """Where streaming's downloader finds what its uploader wrote to `url`.

    The two differ for Azure (streaming 0.13.0; its issue 727 changed one of them): `azure://BOX/PATH` is
    uploaded into the container BOX of the account `AZURE_ACCOUNT_NAME`, but read from the container that PATH begins
    with. The long form, `azure://ACCOUNT.…/BOX/PATH`, stays. Raises `ValueError` where the account, or what Alipan
    needs, is missing.
    """
    place = urlsplit(url)
    if place.scheme == "alipan" and importlib.util.find_spec("alipcs_py") is None:
        raise ValueError("alipan:/// needs the alipan extra: pip install -c constraints.txt -e '.[alipan]'")
    if place.scheme == "alipan" and not os.environ.get("ALIPAN_WEB_REFRESH_TOKEN"):
        raise ValueError("alipan:/// needs the environment variable ALIPAN_WEB_REFRESH_TOKEN")
    if place.scheme not in ("azure", "azure-dl") or "." in place.netloc:
        return url
    account = os.environ.get("AZURE_ACCOUNT_NAME")
    if not account:
        raise ValueError(f"{place.scheme}://{place.netloc} needs the environment variable AZURE_ACCOUNT_NAME")
    return url if place.scheme == "azure-dl" else f"azure://{account}/{place.netloc}{place.path}"


def downloader(url: str) -> Any:
    """A client to `download` with from where `url` is; raises `ValueError` where its settings are wrong."""
    readable(url)  # or says what is missing
    if url.startswith("sftp:"):
        from chimera.sftp import SftpClient

        return SftpClient(url)
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(url)


def uploader(root: str, local: Path) -> Any:
    """What uploads files of the folder `local` to below `root`, by the interface of streaming's uploaders.

    Raises `ValueError` or `KeyError` where its settings are wrong.
    """
    readable(root)  # or says what is missing
    local.mkdir(parents=True, exist_ok=True)
    if root.startswith("sftp:"):
        from chimera.sftp import SftpClient

        return SftpClient(root, str(local))
    if root.startswith("hf:"):
        return HubUploader(root, str(local))
    from streaming.base.storage.upload import CloudUploader

    plain_uploads()
    found = CloudUploader.get((str(local), root), keep_local=True, retry=1, exist_ok=True)
    if root.startswith("alipan:"):
        send_whole(found.api)
    return found


def download(client: Any, url: str, to: Path, seconds: float) -> None:
    """Download what is at `url` to `to`, whole or not at all, by a `client` that `downloader` made.

    `seconds` is how long to wait for an answer. Raises what the client does, and `OSError` where it fails silently.
    """
    # Streaming 0.13.0's for the hub and for Alipan go through a file of the object's own name beside the one asked for:
    # two processes would take each other's away, or a file in place. What a killed one leaves, the next try removes.
    own = to.with_name(f"{to.name}.d")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        client.download(readable(url), str(own / "object"), seconds)
        if not (own / "object").exists():  # streaming's for `gs` passes over errors it does not know
            raise OSError("the store's client gave neither the object nor a reason")
        (own / "object").replace(to)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an exception of any of the stores' clients; 404 for what it calls not found."""
    missing = None
    while error is not None:
        response: Any = getattr(error, "response", None)  # botocore's is a dict, others' are requests' own
        known = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        names = ("status_code", "status", "code")
        for found in (known, *(getattr(place, name, None) for place in (error, response) for name in names)):
            if str(found).isdigit():
                return int(str(found))
        if refusal := REFUSALS.get(str(getattr(error, "error_code", None))):
            return refusal
        if any(kind.__name__ == "AuthenticationException" for kind in type(error).__mro__):
            return 401  # paramiko's
        if isinstance(error, PermissionError) and error.filename is None:
            return 403  # paramiko's too; the system names a file
        if type(error).__name__ == "LocalEntryNotFoundError":
            return None  # the hub's client found nothing on this machine, for it could not ask the hub
        if isinstance(error, FileNotFoundError):
            missing = 404  # but streaming may say so of what was a refusal
        error = error.__cause__
    return missing


def _seconds_asked(error: BaseException | None) -> float | None:
    """How long the server behind an exception asks to wait (`Retry-After`), where it does."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        known = response.get("ResponseMetadata", {}).get("HTTPHeaders") if isinstance(response, dict) else None
        for key, value in dict(known or getattr(response, "headers", None) or {}).items():
            if key.lower() == "retry-after" and str(value).isdigit():
                return float(value)
        error = error.__cause__ or error.__context__
    return None


def wait_to_retry(what: str, said: str, error: Exception, attempt: int, attempts: int) -> None:
    """Say that `attempt` of `attempts` at `what` failed (`said`: why), and wait before the next one.

    That is 1 s and each time twice as long, up to `LONGEST_WAIT`, or as long as the server asks for.
    """
    asked = _seconds_asked(error)
    seconds = min(LONGEST_WAIT, 2.0 ** (attempt - 1)) if asked is None else asked
    say(f"{what}: {said}; attempt {attempt + 1} of {attempts} in {seconds:g} s")
    time.sleep(seconds)


def plain_uploads() -> None:
    """Have boto3 send no trailing checksum to servers other than Amazon's.

    Over TLS it does so by default since 1.36, and some servers (rclone's, for one) refuse such a body
    (boto/boto3#4398). The environment reaches all clients of this process and its children.
    """
    others = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GCS_KEY")
    if any(os.environ.get(name) for name in others):
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")


def send_whole(drive: Any) -> None:
    """Have an Alipan client (`AliPCSApi`) send each file it uploads.

    Where the drive knows a file that begins with the same KiB, alipcs_py 0.8.1 sends a checksum of the whole and takes
    the file for uploaded, whatever the drive answers; and raw shards begin alike. So the client is kept from asking
    whether the drive knows the KiB.
    """
    create = drive.create_file
    drive.prepare_file = lambda name, folder, size, _first_kib, **more: create(name, folder, size, **more)


class HubUploader:
    """Uploads into `hf://datasets/OWNER/NAME/PATH`, one commit a file, by the interface of streaming's uploaders.

    Streaming's own (0.13.0) leaves PATH out, so that its downloader does not find what it wrote.
    """

    def __init__(self, root: str, local: str) -> None:
        from huggingface_hub import HfApi

        owner, name, *folders = root.removeprefix("hf://datasets/").split("/")
        self.local, self._set, self._path = local, f"{owner}/{name}", "/".join(folders)
        self._api = HfApi()

    def upload_file(self, filename: str) -> None:
        """`local/filename` into the set."""
        self._api.upload_file(
            path_or_fileobj=Path(self.local, filename),
            path_in_repo=f"{self._path}/{filename}".lstrip("/"),
            repo_id=self._set,
            repo_type="dataset",
            commit_message=f"Add {filename}",
        )
