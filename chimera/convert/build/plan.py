"""The plan of a build: which source each stream reads, its parts and its encoder path, decided once.

`plan.json` lies in the work folder until the build is published. A rerun goes on with the same source at the same
revision, and all workers read the same settings, parts and tokenizer.
"""

import json
import os
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from chimera.cli import UserError, say
from chimera.convert.build.held_out import HeldOut
from chimera.convert.build.part_state import EVAL
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.probe import chats_of
from chimera.convert.read.reading import Span, Wanted
from chimera.convert.read.sources import Part
from chimera.convert.settings import BuildSettings, TokenizerSettings
from chimera.convert.stream_settings import StreamSettings
from chimera.files import write_whole
from chimera.manifest import ChatTemplate, EncoderPath, Source, Tokenizer
from chimera.mds import Json, ShardFormat, digest
from chimera.text import one_line

PARTS = "parts-"  # with a plan's id: the folder of its parts


@dataclass(frozen=True)
class StreamPlan:
    """A stream as planned: its settings, its source, the column to read there and the parts it is cut into.

    `build` is the plan's id, so that a worker of an earlier plan finds no place in this one's folders.
    """

    build: str
    name: str
    settings: StreamSettings
    source: Source
    column: Wanted
    parts: list[Part]
    encoder: EncoderPath
    template: ChatTemplate | None = None
    split: str | None = None  # that all its documents go to; None: their content decides
    proof: str | None = None  # SHA-256 of its sample's file; None: planned by an earlier version
    held_out: str | None = None  # likewise of the digests, where it is a validation set

    def part_folder(self, work: Path, index: int) -> Path:
        """Where a part lies until it is published."""
        return work / f"{PARTS}{self.build}" / self.name / f"{index:05d}"


@dataclass(frozen=True)
class BuildPlan:
    """`settings` are those that decide the output, as the manifest has them; `running` are all of them."""

    id: str
    settings: Json
    running: Json
    tokenizer: Tokenizer
    dtype: str
    streams: dict[str, StreamPlan]
    clearing: list[str] = field(default_factory=list)  # streams of older builds that are not removed yet

    @cached_property
    def build_settings(self) -> BuildSettings:
        return BuildSettings.model_validate(self.running)

    def without(self, published: Collection[str]) -> "BuildPlan":
        """The plan but for streams that others have published since."""
        kept = {key: stream for key, stream in self.streams.items() if key.removesuffix(EVAL) not in published}
        if len(kept) == len(self.streams):
            return self
        texts = any(stream.settings.format == "text" for stream in kept.values())
        settings, running = (
            {**each, "streams": {name: value for name, value in each["streams"].items() if name not in published}}
            for each in (self.settings, self.running)
        )
        tokenizer = self.tokenizer if texts else self.tokenizer.model_copy(update={"bos": []})
        return replace(self, settings=settings, running=running, tokenizer=tokenizer, streams=kept)

    def shard_format(self, stream: str) -> ShardFormat:
        """How the shards of a stream look."""
        build, mine = self.build_settings, self.streams[stream]
        masked, starts = mine.settings.format != "text", mine.template is not None and mine.template.eos_inside
        return ShardFormat(
            build.block_len, self.dtype, masked, build.compression, build.hash, build.shard_bytes, starts
        )

    def write(self, work: Path) -> None:
        """Make `work/plan.json` this plan."""
        value: Json = {
            "id": self.id,
            "settings": self.settings,
            "running": self.running,
            "tokenizer": {**self.tokenizer.model_dump(), "dtype": self.dtype},
            "streams": {
                name: {
                    "source": stream.source.model_dump(),
                    "column": stream.column,
                    "parts": [[asdict(span) for span in part.spans] for part in stream.parts],
                    "encoder": stream.encoder.model_dump(),
                    "template": stream.template and stream.template.model_dump(),
                    "proof": stream.proof,
                    "held_out": stream.held_out,
                }
                for name, stream in self.streams.items()
            },
        }
        if self.clearing:
            value["clearing"] = self.clearing
        value["sha256"] = _sum_of(value)
        write_whole(work / "plan.json", json.dumps(value, sort_keys=True).encode())


def load_plan(work: Path) -> BuildPlan:
    """The plan in a work folder, as every worker sees it. Raises `UserError` for a damaged one."""
    with open(work / "plan.json", "rb") as file:
        found = os.fstat(file.fileno())
    try:
        return _parse(work / "plan.json", (found.st_ino, found.st_mtime_ns, found.st_size))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{work}/plan.json is damaged ({one_line(error)[:200]}): remove {work} and build again"
        ) from None


def _sum_of(value: Json) -> str:
    """The hash of a plan as JSON, without the hash it holds."""
    return digest("sha256", json.dumps(value, sort_keys=True).encode())


@lru_cache(maxsize=2)
def _parse(path: Path, stamp: tuple[int, ...]) -> BuildPlan:
    """The plan in a file that is read anew, for hours, only when its `stamp` is another."""
    del stamp
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if value.pop("sha256", None) not in (None, _sum_of(value)):  # None: of an earlier version
        raise ValueError("its hash is not that of its bytes")
    streams = BuildSettings.model_validate(value["running"]).streams
    settings = {name: planned_settings(streams, name) for name in value["streams"]}
    return BuildPlan(
        value["id"],
        value["settings"],
        value["running"],
        Tokenizer.model_validate(value["tokenizer"]),
        value["tokenizer"]["dtype"],
        {
            name: StreamPlan(
                value["id"],
                name,
                settings[name][0],
                Source.model_validate(stream["source"]),
                stream["column"],
                [Part(tuple(Span(**span) for span in part)) for part in stream["parts"]],
                EncoderPath.model_validate(stream["encoder"]),
                ChatTemplate.model_validate(stream["template"]) if stream.get("template") else None,
                settings[name][1],
                stream.get("proof"),
                stream.get("held_out"),
            )
            for name, stream in value["streams"].items()
        },
        value.get("clearing", []),
    )


def planned_settings(streams: Mapping[str, StreamSettings], name: str) -> tuple[StreamSettings, str | None]:
    """The settings that a stream of a plan is built by, and the split that all its documents go to.

    A stream with training sources and a validation set of its own is two in a plan, one of them with `EVAL` behind its
    name; one with a validation set alone has that for its source.
    """
    stream = streams[name.removesuffix(EVAL)]
    if name in streams and stream.sources:
        return stream, "train" if stream.eval_sources else None
    return stream.model_copy(update={"sources": stream.eval_sources, "eval_sources": [], "max_tokens": None}), "eval"


def held_out_file(work: Path, stream: str) -> Path:
    """Where the digests of a stream's own validation set lie while it is built."""
    return work / f"held-out-{stream}.npy"


def held_out_of(work: Path, plan: BuildPlan, stream: str) -> HeldOut:
    """What a stream's training rows are compared with. Raises `UserError` where it is damaged."""
    if plan.streams[stream].split != "train":
        return HeldOut(np.zeros(0, np.uint64))
    return HeldOut.read(held_out_file(work, stream), plan.streams[f"{stream}{EVAL}"].held_out)


def sample_file(work: Path, stream: str) -> Path:
    """Where a stream's proof lies until it is published."""
    return work / f"proof-{stream}.jsonl.zst"


def tokenizer_copy(work: Path, plan: BuildPlan) -> bytes:
    """The build's own copy of the tokenizer. Raises `UserError` where it is another."""
    data = (work / "tokenizer.json").read_bytes()
    if digest("sha256", data) != plan.tokenizer.digest:
        raise UserError(f"{work}/tokenizer.json is not the tokenizer of the build: remove {work} and build again")
    return data


def encoder_of(work: Path, plan: BuildPlan, stream: str) -> Encoder:
    """The encoder of the build's own copy of the tokenizer, as the stream was planned with it."""
    tokenizer, mine = plan.tokenizer, plan.streams[stream]
    encoder = copy(_encoder(work, tokenizer.digest, tokenizer.eos_token, tokenizer.pad_token, mine.encoder.path))
    encoder.bos = tuple(tokenizer.bos)
    return encoder_for(mine, encoder)


@lru_cache(maxsize=4)
def _encoder(work: Path, digest: str, eos_token: str, pad_token: str | None, path: str) -> Encoder:
    file = str(work / "tokenizer.json")
    settings = TokenizerSettings(path=file, eos_token=eos_token, pad_token=pad_token, bos="never")
    encoder = Encoder.from_settings(settings, path)
    if encoder.digest != digest:
        raise UserError(f"{work}/tokenizer.json is not the tokenizer of the build: remove {work} and build again")
    if encoder.path != path:
        say(f"planned with the encoder {path}, encoding by {encoder.path}, to the same ids ({encoder.reason})")
    return encoder


def encoder_for(stream: StreamPlan, encoder: Encoder) -> Encoder:
    """An encoder as a stream was planned with it: its template's control tokens are special, its path is taken."""
    mine = encoder.with_control(stream.template.control) if stream.template else copy(encoder)
    if stream.encoder.path == "tokenizers":
        mine.leave_fast_path(stream.encoder.reason)
    return mine


def reader_of(settings: BuildSettings, stream: StreamPlan, encoder: Encoder) -> DocumentReader:
    """What reads the rows of a stream as planned."""
    chats = chats_of(settings, stream.template, encoder) if stream.template else None
    return DocumentReader(stream.settings, encoder.special_ids, stream.column or "", chats)


def text_bos(settings: BuildSettings, encoder: Encoder) -> list[int]:
    """The ids that each text of a build begins with; none where no stream is of texts."""
    return list(encoder.bos) if any(stream.format == "text" for stream in settings.streams.values()) else []
