"""What `convert/` left at a shards root: the manifest and the tokenizer, from a folder or an object store."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chimera.cli import UserError, one_line
from chimera.stores import is_remote
from train.remote import download


@dataclass(frozen=True)
class ShardsTokenizer:
    """The tokenizer the shards were built with."""

    path: Path  # tokenizer.json
    vocab_size: int  # largest id + 1
    eos_id: int
    pad_id: int
    eos_token: str
    pad_token: str

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, its special tokens matched: for prompts, never for training text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class Shards:
    """A shards root as its manifest describes it."""

    root: str
    manifest: dict[str, Any]
    digest: str  # sha256 of manifest.json
    tokenizer: ShardsTokenizer

    @property
    def block_len(self) -> int:
        return int(self.manifest["block_len"])

    @property
    def streams(self) -> dict[str, Any]:
        return self.manifest["streams"]

    def packing(self, stream: str) -> str:
        return self.streams[stream]["packing"]

    def check(self, streams: Iterable[str]) -> None:
        """Raise `UserError` unless each of `streams` is at the root and holds blocks to train on."""
        for name in streams:
            if name not in self.streams:
                raise UserError(
                    f"stream `{name}` (in `phases`) is not in the shards at {self.root}, which hold "
                    f"{', '.join(sorted(self.streams))}: correct the name, or build it with convert/build_shards.py"
                )
            if not self.streams[name]["train"]["blocks"]:
                raise UserError(f"stream `{name}` at {self.root} has no block in its train split")

    def check_tokenizer(self, path: str | None) -> None:
        """Raise `UserError` unless `path` (a folder or tokenizer.json; None: not given) is the shards' tokenizer."""
        if path is None:
            return
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"setting `tokenizer`: no tokenizer.json at {path}")
        given, built = hashlib.sha256(file.read_bytes()).hexdigest(), self.manifest["tokenizer"]["digest"]
        if given != built:
            raise UserError(
                f"setting `tokenizer`: {file} ({given[:12]}) is not the tokenizer the shards at {self.root} were "
                f"built with ({built[:12]}): leave the setting out to take theirs, or build the shards with this one"
            )


def open_shards(root: str, cache: str) -> Shards:
    """Read manifest and tokenizer of a shards root; raises `UserError` where there are none."""
    path = fetch(root, "manifest.json", cache)
    if path is None:
        raise UserError(
            f"no shards at {root} (no manifest.json there): build them with `python convert/build_shards.py`, or "
            "set `shards` to where they are"
        )
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        about = manifest["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}/manifest.json is not a manifest of shards: {one_line(error)}") from None
    tokenizer = fetch(root, "tokenizer/tokenizer.json", cache, digest=about["digest"])
    if tokenizer is None:
        raise UserError(f"the shards at {root} lack their tokenizer/tokenizer.json: build them again")
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != about["digest"]:
        raise UserError(f"{root}/tokenizer/tokenizer.json is not the tokenizer the shards were built with")
    return Shards(
        root=root,
        manifest=manifest,
        digest=hashlib.sha256(text).hexdigest(),
        tokenizer=ShardsTokenizer(
            tokenizer, about["vocab_size"], about["eos_id"], about["pad_id"], about["eos_token"], about["pad_token"]
        ),
    )


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        download(f"{root.rstrip('/')}/{name}", temporary)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error}") from None
    temporary.replace(path)
    return path
