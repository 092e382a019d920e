"""A build's output as its verifier reads it: files of a folder or a store, and the manifest to go by."""

from collections.abc import Collection
from pathlib import Path

from chimera.cli import UserError
from chimera.convert.settings import CLAIMS, LEASE, WORK
from chimera.manifest import Manifest, parse_manifest
from chimera.mds import SPLITS
from chimera.objects import Objects
from chimera.stores import check_writable, is_remote


class VerifyError(Exception):
    """Something of the output is not as it should be."""


class Root:
    """The files of an output, local or remote."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._store: Objects | None = None
        if is_remote(root):
            check_writable(root, "ROOT")
            self._store = Objects(self.root)
        self.seen: set[str] = set()

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises `VerifyError` if it is not there, `UserError` if the store is out of reach."""
        self.seen.add(name)
        if self._store is not None:
            data = self._store.find(name)
            if data is None:
                raise VerifyError(f"{name}: there is no such object")
            return data
        try:
            return (Path(self.root) / name).read_bytes()
        except OSError as error:
            raise VerifyError(f"{name}: cannot be read: {error.strerror}") from None

    def strays(self, streams: Collection[str]) -> list[str]:
        """Files of `streams`, and indexes of others, that were not read; not those of a build that is under way."""
        if self._store is not None:
            names = [entry.key for entry in self._store.list()]
            growing = any(name == LEASE or name.startswith(f"{CLAIMS}/") for name in names)
        else:
            names = [str(p.relative_to(self.root)) for split in SPLITS for p in Path(self.root).glob(f"*/{split}/*")]
            growing = any(file.is_file() for file in Path(self.root).glob(f"{CLAIMS}/*")) or any(
                Path(self.root).glob(f"{WORK}*/plan.json")
            )
        parts = [(name, name.split("/")) for name in names]
        found = [(name, part) for name, part in parts if len(part) == 3 and part[1] in SPLITS]
        of_others = set() if growing else {name for name, part in found if part[2] == "index.json"}
        return sorted((of_others | {name for name, part in found if part[0] in streams}) - self.seen)


def read_manifest(root: Root) -> Manifest:
    """The manifest. Raises `UserError` when there is none to go by."""
    try:
        return parse_manifest(root.read("manifest.json"))
    except (VerifyError, ValueError) as error:
        raise UserError(
            f"{root.root}: no readable manifest.json ({error}): give the `output` of a finished build"
        ) from None
