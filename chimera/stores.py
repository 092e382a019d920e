"""Addresses of object stores, and which of their errors pass by themselves."""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from chimera.cli import REFUSED, UserError
from chimera.retries import Retries
from chimera.text import counted, one_line

URL = re.compile(r"[a-z][a-z0-9-]*:/")  # one slash is enough: `dbfs:/Volumes/...`
SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/+")
# A user, token or password before the host: all up to an `@` of the first name, or to one behind a colon of it that
# begins no port (a password may hold a slash); also percent-encoded. SFTP's user and OCI's bucket stand there.
USER = re.compile(r"[^/]*[@%]|[^/@]*:(?!\d{1,5}(?:/|$))[^@]*@")
NAMED = re.compile(r"[^/@:%]+@[^/@%]+(/.*)?", re.S)  # sftp://USER@HOST, oci://BUCKET@NAMESPACE
NAMES_USER = (
    "holds a user, a token or a password before its host: take it out; docs/clusters.md says where credentials go "
    "(for sftp:// a key)"
)
CUT = re.compile(r"[?#\0-\x1f]")  # where clients may end a path: all objects would have one name
WRITABLE = re.compile(
    r"(s3|gs|azure|azure-dl|oci)://[^/]+(/.*)?|hf://datasets/[^/]+/[^/]+(/.*)?|sftp://[^/]+/.+"
)  # fmt: skip
# `a//b`, `/./`, `/../`: not every client and server keeps them apart from the tidy name
UNTIDY = re.compile(r"(?<=[^:/])//+[^/]|/\.{1,2}(/|$)")
ADDRESSES = (
    "s3://, gs://, azure://, azure-dl:// or oci:// with a bucket, hf://datasets/OWNER/NAME/PATH, or "
    "sftp://USER@HOST/PATH"
)
STATUS = re.compile(r"(?<=non-2xx status code: )(\d{3})")  # obstore's word for an answer
EXPIRED = re.compile(r"<Code>(ExpiredToken|TokenRefreshRequired)</Code>")  # Amazon's words for temporary credentials
REASON = re.compile(r'(?:message|error): "([^"\\]+)"')  # of a failed connection, innermost last: obstore's again

Result = TypeVar("Result")


class StoreError(UserError, OSError):
    """A store cannot be used; one line that names the object, what was tried and why it failed, without secrets."""


class NotOurs(UserError):
    """What is not to be written after all, as whoever asked for it says; no error of the store."""


def is_remote(place: str) -> bool:
    """Whether `place` is a URL (`file://` too) rather than a path.

    Raises `UserError`, which never shows it, for one that `names_user`, for one the clients cut, and for one whose
    scheme is not in small letters, which would be a folder.
    """
    if names_user(place):
        raise UserError(f"an address {NAMES_USER}")
    if URL.match(place) and CUT.search(place):
        raise UserError("an address holds `?`, `#` or a line break, and clients of stores read no further: take it out")
    if odd_scheme(place):
        raise UserError("an address must begin with its scheme in small letters, as s3:// or hf://")
    return URL.match(place) is not None


def names_user(place: str) -> bool:
    """Whether an address holds what logs and manifests must not show: a user, a token or a password."""
    if (scheme := SCHEME.match(place)) is None:
        return False
    rest = place[scheme.end() :]
    plain = scheme[1].lower() in ("sftp", "oci") and NAMED.fullmatch(rest)
    return bool(USER.match(rest)) and not plain


def odd_scheme(place: str) -> bool:
    """Whether `place` begins as an address, but not with a scheme in small letters."""
    return bool(SCHEME.match(place)) and not URL.match(place)


def check_writable(url: str, where: str = "setting `output`") -> None:
    """Raise `UserError`, naming where the URL is given, for one no build can write to."""
    if not WRITABLE.fullmatch(url) or UNTIDY.search(url):
        raise UserError(f"{where}: {url} is not an address to write to: take a folder, {ADDRESSES}")


def attempt(what: str, act: Callable[[], Result], attempts: int, again: Callable[[], None] = lambda: None) -> Result:
    """The result of `act`, tried up to `attempts` times where its error `is_transient`; `again` is called in between.

    Raises `FileNotFoundError` where there is no such object, `OSError` of this machine's own disk as it is, and
    `StoreError` for the rest.
    """
    retries = Retries(what, attempts, is_transient, _words)
    while True:
        try:
            return act()
        except NotOurs:
            raise
        except Exception as error:  # every client has its own kinds
            if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
                raise  # this machine's own
            said = _words(error)
            if status_of(error) == 404:
                raise FileNotFoundError(f"{what} failed: {said}") from None
            if not retries.wait(error):
                raise StoreError(
                    f"{what} failed after {counted(retries.failures, 'attempt')}: {said}: fix it and run the same "
                    "command again; it goes on where it stopped"
                ) from None
            again()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may go well a little later: a busy or broken server or line, not a refusal."""
    if isinstance(error, (UserError, ImportError, ValueError, TypeError, KeyError, RuntimeError)):
        return False
    if type(error).__name__ in ("NotSupportedError", "InvalidPathError", "UnknownConfigurationKeyError"):
        return False  # obstore's
    status = status_of(error)
    if status in (400, 403) and EXPIRED.search(str(error)):
        return True  # whoever renews the credentials may have done so: the next attempt reads them again
    return status is None or status in (408, 425, 429) or not 300 <= status < 500


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an exception of any of the stores' clients; 404 for what it calls not found."""
    missing = None
    while error is not None:
        kind, response = type(error).__name__, getattr(error, "response", None)
        if found := STATUS.search(str(error)):
            return int(found[1])
        for place in (error, response):
            for name in ("status_code", "status", "code"):
                if str(value := getattr(place, name, None)).isdigit():
                    return int(str(value))
        if kind in ("UnauthenticatedError", "AuthenticationException"):  # obstore's, paramiko's
            return 401
        if kind == "PermissionDeniedError" or (isinstance(error, PermissionError) and error.filename is None):
            return 403  # obstore's; paramiko's, where the system would name a file
        if isinstance(error, FileNotFoundError):
            missing = 404  # unless a refusal is behind it
        error = error.__cause__
    return missing


def _words(error: BaseException) -> str:
    """What an error says, on one line: of obstore's the status, the server's code and its message, and of no address
    the query, which may hold a signature."""
    text, _, inner = str(error).partition("\n\nDebug source:")
    text = re.sub(r"^Generic \w+ error: Error performing (\S+ \S+) in \S+ - ", r"\1: ", text)
    if found := STATUS.search(text):
        told = [part[1] for name in ("Code", "Message") if (part := re.search(f"<{name}>(.*?)</{name}>", text, re.S))]
        text = ": ".join([text[found.start() :].partition("<")[0].rstrip(": \n"), *told])
    elif reasons := REASON.findall(inner):
        text += f": {reasons[-1]}"
    said = re.sub(r"\?[^\s'\"<>]*", "", one_line(text))
    if status_of(error) in (401, 403):
        said = f"the store refuses these credentials (HTTP {status_of(error)}; {said})"
    if "redirect without LOCATION" in said:
        said += ": set AWS_DEFAULT_REGION to the bucket's region"
    return said[:400] or type(error).__name__


def plain_uploads() -> None:
    """Have boto3, by which Composer writes checkpoints, send no trailing checksum to servers other than Amazon's.

    Over TLS it does so by default since 1.36, and some servers (rclone's, for one) refuse such a body
    (boto/boto3#4398). The environment reaches all clients of this process and its children.
    """
    others = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GCS_KEY")
    if any(os.environ.get(name) for name in others):
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
