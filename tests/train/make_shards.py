"""Small shards for tests: every block tells its stream and number."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from chimera.manifest import Manifest, Stream, Tokenizer
from chimera.mds import ShardFormat, index_bytes, write_shard
from chimera.train.order.schedule import Phase, Plan, Stage, build_plan
from tests.convert.small_tokenizer import EOS, PAD, spec

BLOCK_LEN = 16


def block_tokens(stream: str, block: int, block_len: int = BLOCK_LEN) -> np.ndarray:
    """What `make_shards` stores as a block, [block_len] uint16."""
    seed = sum(stream.encode())
    return (np.arange(block_len) + 31 * block + 1009 * seed).astype(np.uint16)


def block_mask(block: int, block_len: int = BLOCK_LEN) -> np.ndarray:
    """What the assistant says of a masked stream's block, [block_len] bool."""
    return (np.arange(block_len) + block) % 3 == 0


def make_shards(
    root: Path,
    streams: Mapping[str, Sequence[int]],
    masked: Sequence[str] = (),
    compression: str | None = "zstd:3",
    block_len: int = BLOCK_LEN,
) -> Path:
    """Write `{stream: blocks of each shard}` under `root`, as `convert/` lays them out; returns `root`."""
    described: dict[str, Stream] = {}
    for name, shards in streams.items():
        folder = root / name / "train"
        folder.mkdir(parents=True)
        form = ShardFormat(block_len, "uint16", name in masked, compression, "xxh3_64", 1 << 25)
        entries, first = [], 0
        for number, blocks in enumerate(shards):
            span = range(first, first + blocks)
            tokens = np.stack([block_tokens(name, block, block_len) for block in span])
            masks = np.stack([block_mask(block, block_len) for block in span]) if name in masked else None
            entries.append(write_shard(form, folder, f"shard.{number:05d}", tokens, masks))
            first += blocks
        data = index_bytes(entries)
        (folder / "index.json").write_bytes(data)
        described[name] = Stream.from_index(hashlib.sha256(data).hexdigest(), len(shards), first, block_len, "a test")
    write_manifest(root, described, block_len, compression)
    return root


def write_manifest(root: Path, streams: Mapping[str, Stream], block_len: int, compression: str | None = None) -> None:
    """Write a manifest of these streams, and the small tokenizer as theirs."""
    data = spec().encode()
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_bytes(data)
    found = json.loads(data)
    ids = {token["content"]: token["id"] for token in found["added_tokens"]}
    size = max(found["model"]["vocab"].values()) + 1
    about = {"digest": hashlib.sha256(data).hexdigest(), "vocab_size": size, "eos_token": EOS, "pad_token": PAD}
    tokenizer = Tokenizer(**about, eos_id=ids[EOS], pad_id=ids[PAD])
    shared: Any = {"block_len": block_len, "compression": compression, "hash": "xxh3_64"}
    settings = {**shared, "shard_bytes": 1 << 25, "streams": dict.fromkeys(streams)}
    known = dict(streams)
    manifest = Manifest(format=1, dtype="uint16", tokenizer=tokenizer, streams=known, settings=settings, **shared)
    (root / "manifest.json").write_bytes(manifest.as_bytes())


def plan_for(
    phases: Sequence[tuple[int, Mapping[str, int]]],
    lengths: Mapping[int, int] | None = None,
    batch: int = 12,
    lanes: int = 1,
    block_len: int = BLOCK_LEN,
) -> Plan:
    """A plan of phases (steps, weights), with {from_step: seq_len} (whole blocks) and `batch` sequences a step."""
    built = [
        Phase(f"phase{i}", steps, {n: Fraction(w, sum(weights.values())) for n, w in weights.items()}, batch)
        for i, (steps, weights) in enumerate(phases)
    ]
    stages = [Stage(step, length) for step, length in (lengths or {0: block_len}).items()]
    return build_plan(built, stages, "sequences", block_len, lanes)
