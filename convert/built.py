"""A build's output as its verifier reads it: files of a folder or a store, and the manifest to go by."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from chimera.cli import UserError
from chimera.stores import check_writable, is_remote
from convert.journal import SPLITS
from convert.shards import Json, ShardFormat
from convert.store import Store

COUNTS = ("blocks", "tokens", "padding", "documents")  # of a split
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class Bad(Exception):
    """Something of the output is not as it should be."""


class Root:
    """The files of an output, local or remote; `scratch` is a folder for downloads."""

    def __init__(self, root: str, scratch: Path) -> None:
        self.root = root.rstrip("/")
        self._store: Store | None = None
        if is_remote(root):
            check_writable(root, "ROOT")
            self._store = Store(self.root, scratch, retries=4)
        self.seen: set[str] = set()

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises `Bad` when it is not there, `UserError` when the store is out of reach."""
        self.seen.add(name)
        if self._store is not None:
            data = self._store.get(name)
            if data is None:
                raise Bad(f"{name}: there is no such object")
            return data
        try:
            return (Path(self.root) / name).read_bytes()
        except OSError as error:
            raise Bad(f"{name}: cannot be read: {error.strerror}") from None

    def strays(self, streams: Collection[str]) -> list[str]:
        """Files of `streams`, and indexes of others, that were not read; what a store holds besides, nobody can ask."""
        if self._store is not None:
            return []
        paths = [path.relative_to(self.root) for split in SPLITS for path in Path(self.root).glob(f"*/{split}/*")]
        mine = {str(path) for path in paths if path.name == "index.json" or path.parts[0] in streams}
        return sorted(mine - self.seen)


def read_manifest(root: Root) -> Json:
    """The manifest. Raises `UserError` when there is none to go by."""
    try:
        manifest: Json = json.loads(root.read("manifest.json"))
        if manifest["format"] != 1 or not all(map(PLAIN_NAME.fullmatch, manifest["streams"])):
            raise Bad("not a manifest of this version")
        if manifest["streams"].keys() != manifest["settings"]["streams"].keys():
            raise Bad("its streams are not those of its settings")
        if any(manifest["settings"][key] != manifest[key] for key in ("block_len", "compression", "hash")):
            raise Bad("what it says of all shards is not what its settings say")
        for stream in manifest["streams"].values():
            _check_entry(manifest, stream)
    except (Bad, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{root.root}: no readable manifest.json ({error}): give the `output` of a finished build"
        ) from None
    return manifest


def _check_entry(manifest: Json, stream: Json) -> None:
    """Raise `Bad` or the like where what a stream is compared with is missing or of another type."""
    rows, form = stream["rows"], form_of(manifest, stream)
    numbers = [form.block_len, stream["max_token_id"], rows["read"], rows["documents"]]
    numbers += [*rows["filtered"].values(), *rows["rejected"].values()]
    numbers += [stream[split][key] for split in SPLITS for key in ("shards", *COUNTS)]
    numbers += [manifest["tokenizer"][key] for key in ("eos_id", "pad_id", "vocab_size")]
    words = [manifest["tokenizer"][key] for key in ("digest", "eos_token", "pad_token")]
    words += [stream[split]["index"] or "" for split in SPLITS]
    if not (all(isinstance(n, int) and n >= 0 for n in numbers) and all(isinstance(word, str) for word in words)):
        raise Bad("a value in it is of another type")
    if form.dtype not in ("uint16", "uint32"):
        raise Bad(f"it names the type {form.dtype}")


def form_of(manifest: Json, stream: Json) -> ShardFormat:
    """How the shards of a stream must look."""
    size, masked = manifest["settings"]["shard_bytes"], stream["format"] == "chatml"
    block_len, dtype, compression, hash_ = (manifest[key] for key in ("block_len", "dtype", "compression", "hash"))
    return ShardFormat(block_len, dtype, masked, compression, hash_, size)
