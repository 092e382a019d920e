"""What `convert/` left at a shards root: the manifest and the tokenizer, from a folder or an object store."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.cli import UserError
from chimera.manifest import Manifest, Stream, parse_manifest
from chimera.stores import is_remote
from chimera.tokenizer_file import file_of, load
from chimera.train.data.remote import download
from chimera.train.order.run_plan import densities, plan_of
from chimera.train.order.schedule import Plan

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings

NO_PADDING = -1  # an id no token has


@dataclass(frozen=True)
class ShardsTokenizer:
    """The tokenizer the shards were built with."""

    path: Path  # tokenizer.json
    digest: str  # its SHA-256
    vocab_size: int  # largest id + 1
    eos_id: int
    pad_id: int  # NO_PADDING: there is none
    eos_token: str
    pad_token: str | None
    bos: Sequence[int] = ()  # what each text begins with
    document_ends: str = "eos"  # eos | bos | none: what parts documents

    @cached_property
    def _tokenizer(self) -> Any:
        return load(self.path.read_bytes())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, its special tokens matched: for prompts, never for training text.

        They begin with what each text of the shards does, unless the prompt begins with a special token of its own.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        added = self._tokenizer.get_added_tokens_decoder()
        return ids if ids and ids[0] in added and added[ids[0]].special else [*self.bos, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class Shards:
    """The shards of a run, in one root or several, as their manifests describe them."""

    where: str  # its root, or all of them, for messages
    digest: str  # sha256 of manifest.json, or of those of several roots
    tokenizer: ShardsTokenizer
    block_len: int
    streams: dict[str, Stream]
    roots: Mapping[str, str] = field(default_factory=dict)  # of each stream; left out: all are of `where`

    @property
    def has_texts(self) -> bool:
        """Whether a stream is of texts, so that the tokenizer's `bos` is what they begin with."""
        return any(stream.format == "text" for stream in self.streams.values())

    def root_of(self, stream: str) -> str:
        return self.roots.get(stream, self.where)

    def plan(self, settings: "TrainSettings") -> Plan:
        """The step plan of `settings` over these shards."""
        return plan_of(settings, self.block_len, held_in(self))

    def largest_ids(self, streams: Iterable[str]) -> dict[str, int]:
        """Of those of `streams` that are here: the largest id, -1 where it is not known."""
        return {name: self.streams[name].max_token_id for name in streams if name in self.streams}

    def check(self, streams: Iterable[str]) -> None:
        """Raise `UserError` unless each of `streams` is at the root and holds blocks to train on."""
        for name in streams:
            if name not in self.streams:
                raise UserError(f"stream `{name}` (in `phases`) {not_there(self.where, self.streams)}")
            if not self.streams[name].train.blocks:
                raise UserError(f"stream `{name}` at {self.root_of(name)} has no block in its train split")

    def check_tokenizer(self, path: str | None) -> None:
        """Raise `UserError` unless `path` (a folder or tokenizer.json; None: not given) is the shards' tokenizer."""
        if path is None:
            return
        with file_of(path) as file:
            if not file.is_file():
                raise UserError(f"setting `tokenizer`: no tokenizer.json at {path}")
            given, built = hashlib.sha256(file.read_bytes()).hexdigest(), self.tokenizer.digest
        if given != built:
            raise UserError(
                f"setting `tokenizer`: {path} ({given[:12]}) is not the tokenizer the shards at {self.where} were "
                f"built with ({built[:12]}): leave the setting out to take theirs, or build the shards with this one"
            )


def held_in(shards: Manifest | Shards) -> dict[str, Fraction]:
    """The `densities` of the streams."""
    splits = {name: stream.train for name, stream in shards.streams.items()}
    tokens = {name: split.tokens for name, split in splits.items()}
    return densities(tokens, {name: split.blocks for name, split in splits.items()}, shards.block_len)


def not_there(where: str, streams: Iterable[str]) -> str:
    """What is wrong with a stream that is not among the `streams` of the shards at `where`, after its name."""
    return f"is not in the shards at {where}, which hold {', '.join(sorted(streams))}: correct the name, or build it"


def read_manifest(root: str, cache: str) -> tuple[Manifest, str] | None:
    """The manifest of a shards root and its SHA-256; None where there is none (shards made by others, or none yet)."""
    path = fetch(root, "manifest.json", cache)
    if path is None:
        return None
    data = path.read_bytes()
    try:
        return parse_manifest(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        raise UserError(f"{root}/manifest.json is not a manifest of shards: {error}") from None


def open_shards(root: str, cache: str) -> Shards:
    """Read manifest and tokenizer of a shards root; raises `UserError` where there are none."""
    found = read_manifest(root, cache)
    if found is None:
        raise UserError(
            f"no shards at {root} (no manifest.json there): build them with `python convert/build_shards.py`, or "
            "set `shards` to where they are"
        )
    return as_described(root, cache, *found)


def as_described(root: str, cache: str, manifest: Manifest, digest: str) -> Shards:
    """The shards of a root whose manifest is read; raises `UserError` where its tokenizer is not there."""
    about = manifest.tokenizer
    path = fetch(root, "tokenizer/tokenizer.json", cache, digest=about.digest)
    if path is None:
        raise UserError(f"the shards at {root} lack their tokenizer/tokenizer.json: build them again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != about.digest:
        raise UserError(f"{root}/tokenizer/tokenizer.json is not the tokenizer the shards were built with")
    pad_id = NO_PADDING if about.pad_id is None else about.pad_id
    tokenizer = ShardsTokenizer(path=path, **{**dict(about), "pad_id": pad_id})
    return Shards(root, digest, tokenizer, manifest.block_len, manifest.streams)


def fetch(root: str, name: str, cache: str, digest: str | None = None) -> Path | None:
    """A small file of a shards root as a local path, None if the root has none.

    From a remote root it is downloaded into `cache` each time, unless a copy with sha256 `digest` is there.
    """
    if not is_remote(root):
        path = Path(root, name)
        return path if path.is_file() else None
    key = hashlib.sha256(root.encode()).hexdigest()[:16]
    path = Path(cache, key, name)
    if digest is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # each process its own: this cache has no lock
    try:
        download(f"{root.rstrip('/')}/{name}", temporary)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error}") from None
    temporary.replace(path)
    return path
