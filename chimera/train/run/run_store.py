"""A remote `save_folder`: its checkpoints, which Composer writes, and the run's own files beside them."""

import json
import re
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from math import inf
from pathlib import Path

from chimera.cli import UserError
from chimera.objects import Objects, split
from chimera.stores import StoreError, is_remote

NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")  # Composer's; the same in a local folder
SAVE_SCHEMES = ("s3", "gs", "azure", "oci")  # that Composer and we both write to
RUN_FILES = ("steps.jsonl", "metrics.jsonl", "starts.jsonl", "config.json")  # beside the checkpoints


class RunStore:
    """What is at a URI like `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        if self.uri.partition(":")[0] not in SAVE_SCHEMES:
            raise UserError(
                f"save_folder {self.uri} cannot be used: Composer writes checkpoints to a folder, "
                f"{', '.join(f'{scheme}://' for scheme in SAVE_SCHEMES)} alone"
            )
        self._objects = Objects(self.uri)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The names below the prefix, and their bytes; raises `UserError` where they cannot be listed."""
        try:
            return {entry.key: entry.size for entry in self._objects.list()}
        except StoreError as error:
            raise UserError(f"save_folder {self.uri} cannot be listed: {error}") from None

    def checkpoints(self) -> list[tuple[int, str]]:
        """All checkpoints as (step, URI), newest first."""
        matches = (NAME.fullmatch(name) for name in self.sizes)
        return sorted([(int(match[2]), f"{self.uri}/{match[0]}") for match in matches if match], reverse=True)

    def fetch_files(self, folder: Path, step: int) -> None:
        """Bring the run's own files into `folder` for a start at `step`.

        Another machine may have gone on since this one did: the store's copy counts, unless it ends before `step` and
        the local one reaches further. For a start at 0 the longer one counts, to be kept as `.old`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.sizes.keys() & {*RUN_FILES}:
            copy, ours = folder / f".{file}.fetched", folder / file
            self._objects.fetch(file, copy)
            if file == "config.json" or _end(copy) >= min(_end(ours), step or inf):
                copy.replace(ours)  # `fetch` has written it whole
            else:
                copy.unlink()

    def push_files(self, folder: Path) -> None:
        for file in RUN_FILES:
            if (folder / file).exists():
                self._objects.put(file, folder / file)


def prefix_of(uri: str) -> str:
    """What the names of a remote `save_folder`'s objects begin with."""
    prefix = split(uri)[1]
    return f"{prefix}/" if prefix else ""


def fetch(uri: str, path: Path) -> None:
    """Download the checkpoint at `uri` (or the one that a `latest-rank0.pt` there names) to `path`, over what is there.

    Raises `UserError` where that fails.
    """
    place, key = split(uri)
    objects = Objects(place)
    try:
        try:
            objects.fetch(key, path)
        except FileNotFoundError:
            if (named := objects.find(f"{key}.symlink")) is None:  # as Composer writes it
                raise
            objects.fetch(named.decode().strip(), path)
    except OSError as error:
        raise UserError(f"checkpoint {uri} cannot be fetched: {error}") from None


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
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # the last may be damaged
            if type(step := json.loads(line)["step"]) is int:
                return step + 1
    return len(lines)
