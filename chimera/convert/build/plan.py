"""The plan of a build: which source each stream reads, its parts and its encoder path, decided once.

`plan.json` lies in the work folder until the build is published. A rerun goes on with the same source at the same
revision, and all workers read the same settings, parts and tokenizer.
"""

import json
import os
import secrets
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np

from chimera.cli import UserError, say
from chimera.convert.build.head import encodes, sample_of
from chimera.convert.build.held_out import write_digests
from chimera.convert.build.part_state import EVAL
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.probe import chats_of, probed
from chimera.convert.encode.proof import prove_sample
from chimera.convert.encode.proof_lines import proof_of
from chimera.convert.read.reading import Span, Wanted
from chimera.convert.read.sources import Part, open_source
from chimera.convert.settings import BuildSettings, StreamSettings, TokenizerSettings, identity, running_settings
from chimera.files import write_whole
from chimera.manifest import ChatTemplate, EncoderPath, Source, Tokenizer
from chimera.mds import Json, ShardFormat
from chimera.text import one_line
from chimera.tokenizer_file import gave_up

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
                }
                for name, stream in self.streams.items()
            },
        }
        if self.clearing:
            value["clearing"] = self.clearing
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


@lru_cache(maxsize=2)
def _parse(path: Path, stamp: tuple[int, ...]) -> BuildPlan:
    """The plan in a file that is read anew, for hours, only when its `stamp` is another."""
    del stamp
    value = json.loads(path.read_bytes())
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


def sample_file(work: Path, stream: str) -> Path:
    """Where a stream's proof lies until it is published."""
    return work / f"proof-{stream}.jsonl.zst"


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


def make_plan(settings: BuildSettings, work: Path, older: set[str], encoder: Encoder) -> BuildPlan:
    """What every stream reads and how, from opening its source. Raises `UserError` where one does not open.

    `older` are streams of builds that this one replaces, `encoder` is of the settings' tokenizer.
    """
    name, streams = secrets.token_hex(8), {}
    for stream, given in settings.streams.items():
        streams[stream] = plan_stream(name, stream, settings, work, encoder)
        if given.sources and given.eval_sources:
            held_out, template = f"{stream}{EVAL}", streams[stream].template
            streams[held_out] = plan_stream(name, held_out, settings, work, encoder, template)
    tokenizer = Tokenizer(
        digest=encoder.digest,
        vocab_size=encoder.vocab_size,
        eos_token=settings.tokenizer.eos_token,
        eos_id=encoder.eos_id,
        pad_token=settings.tokenizer.pad_token,
        pad_id=encoder.pad_id,
        bos=text_bos(settings, encoder),
    )
    return BuildPlan(
        name,
        identity(settings),
        running_settings(settings),
        tokenizer,
        np.dtype(encoder.dtype).name,
        streams,
        sorted(older | settings.streams.keys()),
    )


def text_bos(settings: BuildSettings, encoder: Encoder) -> list[int]:
    """The ids that each text of a build begins with; none where no stream is of texts."""
    return list(encoder.bos) if any(stream.format == "text" for stream in settings.streams.values()) else []


def plan_stream(
    build: str,
    name: str,
    settings: BuildSettings,
    work: Path,
    encoder: Encoder,
    template: ChatTemplate | None = None,
) -> StreamPlan:
    """What one stream reads and how: by `encoder`, off its fast path where that gives other ids on a sample.

    `template`: what the stream's own validation set is rendered by; None: found out here.
    """
    (stream, split), where = planned_settings(settings.streams, name), f"streams.{name}"
    opened = open_source(name, stream, settings, work)
    template = template or probed(name, stream, settings, encoder)
    source = Source(index=opened.index, describe=opened.describe, passed_over=opened.passed_over)
    path = EncoderPath(path=encoder.path, reason=encoder.reason)
    plan = StreamPlan(build, name, stream, source, opened.column, opened.parts, path, template, split)
    mine = encoder_for(plan, encoder)
    if stream.format == "chatml":
        mine.check_chat(where)
    reader = reader_of(settings, plan, mine)
    sample = sample_of(where, stream, opened, reader, settings.limits(work))
    if name.endswith(EVAL):
        file = held_out_file(work, name.removesuffix(EVAL))
        write_digests(file, opened.parts, opened.column, reader, settings.limits(work))

    def proven() -> tuple[str, bytes]:
        mine.verify_sample(sample.texts)
        rows, documents = sample.rows, sample.documents
        words = (
            prove_sample(where, rows, documents, reader, mine, settings.tokenizer) if stream.format != "text" else ""
        )
        return words, proof_of(rows, documents, reader, mine)

    try:
        words, proof = proven()
    except BaseException as error:
        if not gave_up(error):
            raise
        sample.keep(partial(encodes, mine))  # the build rejects those rows
        words, proof = proven()
    if sample.shapes:
        say(f"{name}: conversations in {' and '.join(f'`{shape}`' for shape in sorted(sample.shapes))}")
    say(f"{name}: encoder {mine.path} ({mine.reason})")
    if words:
        say(f"{name}: {words}")
    write_whole(sample_file(work, name), proof)
    return replace(plan, encoder=EncoderPath(path=mine.path, reason=mine.reason))
