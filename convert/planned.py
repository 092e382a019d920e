"""What every worker reads of the build's plan: settings, parts, tokenizer; the same on all of them."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from chimera.cli import UserError
from convert.encoding import Encoder
from convert.reading import Span
from convert.settings import BuildSettings, StreamSettings, TokenizerSettings, settings_from
from convert.shards import ShardFormat
from convert.sources import Part

PARTS = "parts-"  # with a plan's name: the folder of its parts


@dataclass(frozen=True)
class StreamPlan:
    """A stream as planned: its settings, the column to read, its parts and which encoder path it takes.

    `build` is the plan's own name, so that a worker of an earlier plan finds no place in this one's folders.
    """

    build: str
    name: str
    settings: StreamSettings
    column: str | None
    parts: list[Part]
    encoder_path: str

    def part_folder(self, work: Path, index: int) -> Path:
        """Where a part lies until it is published."""
        return work / f"{PARTS}{self.build}" / self.name / f"{index:05d}"


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
        streams[name] = StreamPlan(
            plan["id"], name, settings.streams[name], stream["column"], parts, stream["encoder"]["path"]
        )
    return PlannedBuild(settings, streams, plan["tokenizer"]["digest"])


def encoder_of(work: Path, build: PlannedBuild, stream: str) -> Encoder:
    """The encoder of the build's own copy of the tokenizer, on the path the stream was planned with."""
    names = build.settings.tokenizer
    return _encoder(work, build.tokenizer_digest, names.eos_token, names.pad_token, build.streams[stream].encoder_path)


@lru_cache(maxsize=4)
def _encoder(work: Path, digest: str, eos_token: str, pad_token: str, path: str) -> Encoder:
    encoder = Encoder.from_settings(TokenizerSettings(str(work / "tokenizer.json"), eos_token, pad_token), path)
    if encoder.digest != digest:
        raise UserError(f"{work}/tokenizer.json is not the tokenizer of the build: remove {work} and build again")
    return encoder


def shard_format(build: BuildSettings, stream: StreamSettings, dtype: str) -> ShardFormat:
    """How the shards of one stream look."""
    masked = stream.format == "chatml"
    return ShardFormat(build.block_len, dtype, masked, build.compression, build.hash, build.shard_bytes)
