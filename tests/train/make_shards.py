"""Small shards for tests: every block tells its stream and number."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from convert.shards import ShardFormat, index_bytes, write_shard
from train.schedule import Phase, Plan, Stage, build_plan

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
    manifest: dict = {"block_len": block_len, "streams": {}}
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
        manifest["streams"][name] = {"train": {"blocks": first, "index": hashlib.sha256(data).hexdigest()}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


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
