"""Typed settings of `shards.yaml`, and which of them decide the bytes of the output.

docs/settings.md is made from the fields.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from chimera.chatml import IM_END, IM_START
from chimera.cli import parse_bytes
from chimera.config import Bytes, Place, Settings, Switch
from chimera.convert.stream_settings import USUAL, Name, StreamSettings
from chimera.limits import LEAST, Limits, available_memory
from chimera.mds import known_hashes
from chimera.stores import check_writable, is_remote
from chimera.text import one_line

CLAIMS = ".claims"  # in an output: the folder of those that build its streams
LEASE = "builder.json"  # of a store, while a build of an earlier version writes to it: who it is
WORK = ".work"  # of a local output, while it is built: what is unfinished
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # a file's name is at most 255 bytes
_TAKEN = ("rejects", "tokenizer", "proof")  # folders of the output that are no stream's

# Settings that say how a build runs, not what it writes: they may change between runs of one build.
_RUNNING = (
    *("output", "workers", "engine", "ray_address", "work", "stall_after", "retries"),
    *("rebuild", "worker_memory", "only"),
)


def _names(given: Any) -> Any:
    return [name for part in given.split(",") if (name := part.strip())] if isinstance(given, str) else given


class TokenizerSettings(Settings):
    path: Place = Field(
        "",
        min_length=1,
        description="a folder with a tokenizer.json (.model, tekken.json), or that file, here or in a store",
    )
    eos_token: str = Field("<|endoftext|>", description="the added token that ends documents")
    pad_token: str | None = Field(
        "<|padding|>",
        description="the added token that fills blocks; another one. `{add: TOKEN}` adds it; null: all is `concat`",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description="before each text document. auto: what the tokenizer's post-processor puts there; always: also the "
        "bos_token of its tokenizer_config.json; chats have what their template writes",
    )
    add_tokens: list[Name] = Field([], description="special tokens that it gets where it lacks them: ChatML's, say")

    @model_validator(mode="before")
    @classmethod
    def _added_pad(cls, given: Any) -> Any:
        """`pad_token: {add: TOKEN}` as `pad_token: TOKEN` and one of `add_tokens`."""
        pad = given.get("pad_token") if isinstance(given, dict) else None
        if not (isinstance(pad, dict) and pad.keys() == {"add"} and isinstance(pad["add"], str)):
            return given
        return {**given, "pad_token": pad["add"], "add_tokens": [*given.get("add_tokens", ()), pad["add"]]}

    @field_validator("pad_token", mode="before")
    @classmethod
    def _pad(cls, pad: Any) -> Any:
        if isinstance(pad, (dict, list)):
            raise PydanticCustomError("form", "a token, {{add: TOKEN}} or null")
        return pad


class BuildSettings(Settings):
    output: Place = Field("", min_length=1, description="a folder, s3://, gs://, azure:// or another address")
    tokenizer: TokenizerSettings = Field(TokenizerSettings(), description="whose ids the shards hold")
    block_len: int = Field(1024, ge=8, lt=1 << 28, multiple_of=8, description="tokens of a block: the longest sequence")
    compression: str | None = Field("zstd:3", description="of shards: null, zstd, or zstd:1 to zstd:22")
    hash: str = Field("xxh3_64", description="of shards, in their index: one that streaming can check")
    shard_bytes: int = Field(32 << 20, ge=1, lt=1 << 31, description="of a shard, before compression")
    part_bytes: int = Field(64 << 20, ge=1024, description="of source text that a part of local files holds, about")
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="processes (local) or tasks at a time (ray); auto: the cores available"
    )
    worker_memory: Bytes | None = Field(
        None, description="that reading may bring a worker to; null: its share of what is free"
    )
    engine: Literal["local", "ray", "array"] = Field(
        "local",
        description="where workers run: here, on a Ray cluster, or in all processes that run this command (array)",
    )
    ray_address: str | None = Field(
        None, description="null: a cluster already running here, else one started for the build"
    )
    eval_fraction: float = Field(0.005, ge=0, lt=1, description="of the documents, chosen by content")
    stall_after: float = Field(120.0, gt=0, description="seconds without a row before a source is named as stalled")
    retries: int = Field(
        6, ge=1, description="attempts in a row at a hub or store, with back-off from 1 s doubling to 60 s"
    )
    work: Place | None = Field(
        None, description="folder for unfinished work; null: OUTPUT/.work, or ~/.cache/chimera for a remote output"
    )
    rebuild: Switch = Field(
        False,
        description="replace an output that was built with other settings; remove its streams that are not named here",
    )
    only: Annotated[list[str], BeforeValidator(_names)] = Field(
        [], description="names of streams: build these alone. Other builders may build others of the output meanwhile"
    )
    streams: dict[str, StreamSettings] = Field({}, min_length=1, description="what each stream is made of, by its name")

    @field_validator("output")
    @classmethod
    def _output(cls, output: str) -> str:
        if is_remote(output):
            check_writable(output)
        return output

    @field_validator("compression", mode="before")
    @classmethod
    def _compression(cls, compression: Any) -> Any:
        if compression is not None and not re.fullmatch(r"(zstd(:([1-9]|1[0-9]|2[0-2]))?)?", str(compression)):
            raise PydanticCustomError("form", "null, zstd or zstd:1 to zstd:22")
        return compression

    @field_validator("hash")
    @classmethod
    def _hash(cls, name: str) -> str:
        if name not in known_hashes():
            raise ValueError(f"one of {', '.join(known_hashes())}")
        return name

    @field_validator("worker_memory")
    @classmethod
    def _worker_memory(cls, memory: int | float | str | None) -> int | float | str | None:
        if memory is not None and parse_bytes(memory, "worker_memory") < LEAST:
            raise ValueError(f"at least {LEAST >> 20}mb")
        return memory

    @field_validator("streams")
    @classmethod
    def _streams(cls, streams: dict[str, StreamSettings]) -> dict[str, StreamSettings]:
        for name in streams:
            if not stream_name(name):
                raise ValueError(
                    f"`{name}`: a stream's name is at most 128 letters, digits, `_` and `-` (in quotes where YAML "
                    f"reads it as something else), and none of {', '.join(_TAKEN)}"
                )
        return streams

    @model_validator(mode="after")
    def _chosen(self) -> "BuildSettings":
        if unknown := [name for name in self.only if name not in self.streams]:
            raise ValueError(f"setting `only`: there is no stream {one_line(unknown[0])} in `streams`")
        if self.only and self.rebuild:
            raise ValueError("`rebuild` replaces the output as a whole: leave `only` out")
        self.streams = {name: stream for name, stream in self.streams.items() if name in self.only or not self.only}
        return self

    @model_validator(mode="after")
    def _ends(self) -> "BuildSettings":
        chat = [name for name, stream in self.streams.items() if stream.format == "chatml"]
        if chat and self.tokenizer.pad_token in (IM_START, IM_END):
            raise ValueError(
                f"setting `tokenizer.pad_token`: {self.tokenizer.pad_token} marks the turns of streams.{chat[0]} "
                "(format: chatml), and padding is never trained: take another special token, <|padding|> or one like it"
            )
        if chat and self.tokenizer.eos_token == IM_END:
            raise ValueError(
                f"setting `tokenizer.eos_token`: {IM_END} ends the messages of streams.{chat[0]} (format: chatml), so "
                "another special token must end documents: <|endoftext|> or one like it"
            )
        return self

    @model_validator(mode="after")
    def _padding(self) -> "BuildSettings":
        for name, stream in self.streams.items() if self.tokenizer.pad_token is None else ():
            if stream.packing != "concat" or not stream.min_tokens:
                raise ValueError(
                    "setting `tokenizer.pad_token`: null is for streams of `packing: concat` and `min_tokens` of at "
                    f"least 1, which streams.{name} is not: name a token, or add one: pad_token: {{add: <|pad|>}}"
                )
        return self

    @property
    def remote(self) -> bool:
        return is_remote(self.output)

    @property
    def work_folder(self) -> Path:
        """Where unfinished work lies between runs; the same for every run of one output, and of no other.

        It is removed with the work, so it is never a folder of the user's.
        """
        names = " ".join(sorted({*self.only}))  # each choice of streams has its own
        if self.work is None and not self.remote:
            return Path(self.output).absolute() / (f"{WORK}-{_digest(names)}" if names else WORK)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chimera"
        output = self.output.rstrip("/") if self.remote else os.path.realpath(self.output)
        return Path(self.work or cache).absolute() / f"build-{_digest(f'{output} {names}' if names else output)}"

    @property
    def worker_count(self) -> int:
        return cores() if self.workers == "auto" else int(self.workers)

    def limits(self, scratch: Path | None = None) -> Limits:
        """What a worker here may take to read its source."""
        here = self.worker_count if self.engine == "local" else min(self.worker_count, cores())
        if self.worker_memory is not None:
            return Limits(parse_bytes(self.worker_memory, "worker_memory"), self.retries, scratch)
        return Limits(max(LEAST, available_memory() // here), self.retries, scratch)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stream_name(name: str) -> bool:
    """Whether a stream may be called so: a folder of the output has that name."""
    return bool(_NAME.fullmatch(name)) and name not in _TAKEN


class TrainingSettings(BuildSettings):
    """The settings of a build and those of the tokenizer's training."""

    vocab_size: int = Field(32_000, ge=1, le=1 << 24, description="tokens, at most; special tokens are among them")
    min_frequency: int = Field(2, ge=0, le=1 << 60, description="of a pair of tokens, to be merged")
    chars_per_stream: int = Field(
        100_000_000, ge=1, le=1 << 60, description="read from the head of each stream's source"
    )
    overwrite: Switch = Field(False, description="replace the tokenizer at `tokenizer.path`")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(settings: BuildSettings) -> dict[str, Any]:
    """The settings that decide the output, as JSON values; two builds with equal identities write equal bytes.

    The tokenizer stands in the manifest by its digest and the ids it puts before texts, so `path`, `add_tokens` and
    `bos` are left out.
    """
    shaping = {key: value for key, value in settings.model_dump().items() if key not in _RUNNING}
    for key in ("path", "bos", "add_tokens"):
        del shaping["tokenizer"][key]
    for stream in shaping["streams"].values():  # as in builds of before there was a choice
        for key, usual in {**USUAL, "eval_sources": [], "eval_overlap": "keep"}.items():
            if stream[key] == usual:
                del stream[key]
        if stream.get("template", "tokenizer") != "tokenizer":
            stream["template"] = "file"  # whose text stands in the manifest too
    return shaping


def running_settings(settings: BuildSettings) -> dict[str, Any]:
    """All settings for the workers, as JSON values; workers beside the builder share the memory free at its start."""
    share = settings.limits().memory if settings.engine == "local" else settings.worker_memory
    return {**settings.model_dump(), "worker_memory": share}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as `key: old -> new` lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys(), key=str)
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    if old is None and isinstance(new, dict):
        return [f"{path} is new"]
    if new is None and isinstance(old, dict):
        return [f"{path} is gone"]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
