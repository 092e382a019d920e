"""A remote `save_folder`: its checkpoints, and the run's own files beside them."""

import json
import re
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any

from composer.utils import get_file, maybe_create_object_store_from_uri, parse_uri

from chimera.cli import UserError, one_line
from chimera.stores import is_remote

NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")  # Composer's; the same in a local folder
RUN_FILES = ("steps.jsonl", "metrics.jsonl", "starts.jsonl", "config.json")  # beside the checkpoints


class RunStore:
    """What is at a URI like `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.prefix = prefix_of(self.uri)
        if self.uri.startswith("dbfs:"):  # Composer's client, 0.32.1, passes no `overwrite` on
            raise UserError(
                f"save_folder {self.uri} cannot be used: Composer's client replaces no file there: name the folder it "
                "is mounted at (/Volumes/...)"
            )
        try:
            self.store: Any = maybe_create_object_store_from_uri(self.uri)
        except Exception as error:  # an unknown scheme, credentials that are not there: every backend has its own kinds
            raise UserError(f"save_folder {self.uri} cannot be used: {_words(error)}") from None

    @cached_property
    def names(self) -> set[str]:
        """The names below the prefix; raises `UserError` where they cannot be listed."""
        try:
            names = self.store.list_objects(self.prefix or None)
        except Exception as error:  # every backend has its own kinds
            raise UserError(f"save_folder {self.uri} cannot be listed: {_words(error)}") from None
        return {name[len(self.prefix) :] for name in names if name.startswith(self.prefix)}

    def checkpoints(self) -> list[tuple[int, str]]:
        """All checkpoints as (step, URI), newest first."""
        matches = (NAME.fullmatch(name) for name in self.names)
        return sorted([(int(match[2]), f"{self.uri}/{match[0]}") for match in matches if match], reverse=True)

    def fetch_files(self, folder: Path, step: int) -> None:
        """Bring the run's own files into `folder` for a start at `step`.

        Another machine may have gone on since this one did: the store's copy counts, unless it ends before `step` and
        the local one reaches further. For a start at 0 the longer one counts, to be kept as `.old`.
        """
        folder = folder.absolute()  # Composer 0.32.1 joins a relative name to its folder once more on OCI
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.names.intersection(RUN_FILES):
            copy, ours = folder / f".{file}.fetched", folder / file
            self.store.download_object(self.prefix + file, copy, overwrite=True)
            if file == "config.json" or _end(copy) >= min(_end(ours), step or inf):
                copy.replace(ours)
            else:
                copy.unlink()

    def push_files(self, folder: Path) -> None:
        for file in RUN_FILES:
            if (folder / file).exists():
                self.store.upload_object(self.prefix + file, folder / file)


def prefix_of(uri: str) -> str:
    """What the names of a remote `save_folder`'s objects begin with."""
    prefix = parse_uri(uri.rstrip("/"))[2]
    return f"{prefix}/" if prefix else ""


def fetch(uri: str, path: Path) -> None:
    """Download the checkpoint at `uri` (or the one that a `latest-rank0.pt` there names) to `path`, over what is there.

    Raises `UserError` where that fails.
    """
    path = path.absolute()  # as in `fetch_files`
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        get_file(uri, str(path), overwrite=True, progress_bar=False)
    except Exception as error:  # every backend has its own kinds
        raise UserError(f"checkpoint {uri} cannot be fetched: {_words(error)}") from None


def run_folder(run_name: str, save_folder: str) -> Path:
    """The local folder of the run's own files: `save_folder`, or for a remote one `runs/RUN_NAME-HASH of its URI`."""
    if not is_remote(save_folder):
        return Path(save_folder)
    return Path("runs", f"{run_name}-{sha256(save_folder.rstrip('/').encode()).hexdigest()[:8]}")


def _end(path: Path) -> float:
    """One past the last step in a JSON-lines file; for starts.jsonl, which has no steps, its number of whole lines."""
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):  # the last may be damaged
            return int(json.loads(line)["step"]) + 1
    return len(lines)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:300]}"
