"""What the pinned clients of object stores need before they read and write."""

import os
from urllib.parse import urlsplit


def readable(url: str) -> str:
    """Where streaming's downloader finds what its uploader wrote to `url`.

    The two differ for Azure (streaming 0.13.0; its issue 727 changed one of them): `azure://BOX/PATH` is
    uploaded into the container BOX of the account `AZURE_ACCOUNT_NAME`, but read from the container that PATH begins
    with. Raises `ValueError` where no account is named. The long form, `azure://ACCOUNT.…/BOX/PATH`, stays.
    """
    place = urlsplit(url)
    if place.scheme != "azure" or "." in place.netloc:
        return url
    account = os.environ.get("AZURE_ACCOUNT_NAME")
    if not account:
        raise ValueError(f"azure://{place.netloc} needs the environment variable AZURE_ACCOUNT_NAME")
    return f"azure://{account}/{place.netloc}{place.path}"


def plain_uploads() -> None:
    """Have boto3 send no trailing checksum to servers other than Amazon's.

    Over TLS it does so by default since 1.36, and some servers (rclone's, for one) refuse such a body
    (boto/boto3#4398). The environment reaches all clients of this process and its children.
    """
    others = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GCS_KEY")
    if any(os.environ.get(name) for name in others):
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
