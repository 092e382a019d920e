"""Where a build ends up: a folder or an object store. Both take finished shards, small files, then the manifest."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from chimera.cli import UserError
from chimera.convert.build.folder_output import FolderOutput
from chimera.convert.build.store_output import StoreOutput
from chimera.convert.settings import BuildSettings
from chimera.manifest import Manifest, NotAManifest, parse_manifest
from chimera.mds import Json

MANIFEST = "manifest.json"


class Output(Protocol):
    name: str

    def lock(self, streams: Iterable[str], terms: Json) -> contextlib.AbstractContextManager[None]:
        """Keep other builders of this file system from `streams` meanwhile.

        Raises `UserError` where there is one, or one of other streams that has other `terms`.
        """
        ...

    def acquire(self, work: Path, streams: Iterable[str], terms: Json, rebuild: bool) -> None:
        """Claim `streams` for the build in `work`, beyond its end if it is killed; what `lock` did may be enough.

        Raises `UserError` where another work folder's build has begun one of them, or others on other `terms`, unless
        `rebuild` takes over.
        """
        ...

    def check_claims(self, streams: Iterable[str] | None = None) -> None:
        """Raise `UserError` where another builder has taken over what this one has acquired, or of it `streams`."""
        ...

    def release(self) -> None:
        """Give up what the build in this work folder has acquired."""
        ...

    def read(self, key: str) -> bytes | None:
        """A small file of the output, or `None`."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        ...

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Make a small file what `change` makes of it, of which no other builder's change is lost; returns that.

        What has its change already is given back by `change` as it is.
        """
        ...

    def put(self, file: Path, key: str) -> None:
        """A file of any size, whole or not at all; `file` may be gone afterwards."""
        ...

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        """Publish the finished shard `made` as `key`; returns whether the output holds it as its index entry says.

        May be repeated after a kill: then `made` can be gone, and what was published is checked.
        """
        ...

    def check_free(self, streams: Iterable[str], rebuild: bool, finished: bool = False) -> None:
        """Raise `UserError` where there is no room for a new build of `streams`; `rebuild` lets an older one go.

        `finished`: a manifest of other streams is there, and stays.
        """
        ...

    def remove_manifest(self, older: Manifest) -> None:
        """Remove the manifest, if it is there. Raises `UserError` where it is another by now."""
        ...

    def clear(self, streams: Iterable[str]) -> None:
        """Remove what an older build left of `streams`, which no manifest names; may be repeated after a kill."""
        ...

    def remove_stale(self, split: str, known: Iterable[str]) -> None:
        """Remove what a build killed here left in `STREAM/SPLIT` beside the index and the shards in `known`."""
        ...

    def delete_shard(self, key: str) -> None:
        """Remove a shard that is not part of the output after all."""
        ...


def open_output(settings: BuildSettings) -> Output:
    """The output the settings name."""
    if settings.remote:
        return StoreOutput(settings.output, settings.work_folder, settings.retries)
    return FolderOutput(settings.output)


def manifest_of(output: Output) -> Manifest | None:
    """The output's manifest, or `None` before it is whole. Raises `UserError` for one of another program."""
    return _parsed(output.name, output.read(MANIFEST))


def update_manifest(output: Output, change: Callable[[Manifest | None], Manifest]) -> Manifest:
    """Make the output's manifest what `change` makes of it, of which no other builder's change is lost."""

    def changed(found: bytes | None) -> bytes:
        output.check_claims()  # at each attempt
        return change(_parsed(output.name, found)).as_bytes()

    return parse_manifest(output.update(MANIFEST, changed))


def _parsed(output: str, data: bytes | None) -> Manifest | None:
    try:
        return None if data is None else parse_manifest(data)
    except NotAManifest:
        raise UserError(
            f"{output}/{MANIFEST} was written by another version or program: choose another `output`"
        ) from None
    except ValueError as error:
        raise UserError(f"{output}/{MANIFEST} is damaged ({error}): bring it back, or remove that file") from None
