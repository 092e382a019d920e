"""What every worker reads of the build's plan: settings, parts, tokenizer; the same on all of them."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from convert.encoding import Encoder
from convert.reading import Span
from convert.settings import BuildSettings, StreamSettings, TokenizerSettings, settings_from
from convert.shards import ShardFormat
from convert.sources import Part


@dataclass(frozen=True)
class StreamPlan:
    """A stream as planned: its settings, the column to read, its parts and which encoder path it takes."""

    name: str
    settings: StreamSettings
    column: str | None
    parts: list[Part]
    encoder_path: str


@dataclass(frozen=True)
class PlannedBuild:
    settings: BuildSettings
    streams: dict[str, StreamPlan]
    tokenizer_digest: str


def load_plan(work: Path) -> PlannedBuild:
    """The build from `work/plan.json`, as every worker sees it."""
    return _parse_plan((work / "plan.json").read_bytes())


@lru_cache(maxsize=2)
def _parse_plan(data: bytes) -> PlannedBuild:
    plan = json.loads(data)
    settings = settings_from(plan["running"])
    streams = {}
    for name, stream in plan["streams"].items():
        parts = [Part(tuple(Span(**span) for span in part)) for part in stream["parts"]]
        streams[name] = StreamPlan(name, settings.streams[name], stream["column"], parts, stream["encoder"]["path"])
    return PlannedBuild(settings, streams, plan["tokenizer"]["digest"])


def encoder_of(work: Path, build: PlannedBuild, stream: str) -> Encoder:
    """The encoder of the build's own copy of the tokenizer, on the path the stream was planned with."""
    names = build.settings.tokenizer
    return _encoder(work, build.tokenizer_digest, names.eos_token, names.pad_token, build.streams[stream].encoder_path)


@lru_cache(maxsize=4)
def _encoder(work: Path, digest: str, eos_token: str, pad_token: str, path: str) -> Encoder:
    del digest  # only tells tokenizers of the same place apart
    return Encoder.from_settings(TokenizerSettings(str(work / "tokenizer.json"), eos_token, pad_token), path)


def shard_format(build: BuildSettings, stream: StreamSettings, dtype: str) -> ShardFormat:
    """How the shards of one stream look."""
    masked = stream.format == "chatml"
    return ShardFormat(build.block_len, dtype, masked, build.compression, build.hash, build.shard_bytes)


def part_folder(work: Path, stream: str, index: int) -> Path:
    return work / "parts" / stream / f"{index:05d}"
