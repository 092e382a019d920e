"""Typed settings of `shards.yaml`, and which of them decide the bytes of the output."""

import hashlib
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chimera.chatml import IM_END
from chimera.cli import UserError
from chimera.stores import check_writable, is_remote
from convert.packing import PACKINGS

FORMATS = ("text", "chatml")
ENGINES = ("local", "ray")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # a file's name is at most 255 bytes
_TAKEN = ("rejects", "tokenizer")  # folders of the output that are no stream's

# Settings that say how a build runs, not what it writes: they may change between runs of one build.
_RUNNING = ("output", "workers", "engine", "ray_address", "work", "stall_after", "retries", "rebuild")


@dataclass
class TokenizerSettings:
    path: str = ""  # to be given: a folder with a tokenizer.json, or that file
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|padding|>"


@dataclass
class SourceSettings:
    """A hub set (`hub`, `subset`, `data_dir`, `split`, `revision`) or local files (`files`: paths and globs)."""

    hub: str | None = None
    subset: str | None = None
    data_dir: str | None = None  # the folder of the set to read alone, as `load_dataset` takes it
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    files: list[str] = field(default_factory=list)


@dataclass
class StreamSettings:
    format: str = "text"
    packing: str = "concat"
    min_chars: int | None = 50  # text only
    min_tokens: int = 10  # without the closing EOS
    max_tokens: int | None = None  # of the train split, without padding: the document that reaches it is the last
    sources: list[SourceSettings] = field(default_factory=list)


@dataclass
class BuildSettings:
    output: str = ""  # to be given
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    block_len: int = 1024
    compression: str | None = "zstd:3"
    hash: str = "xxh3_64"
    shard_bytes: int = 32 << 20  # of a shard before compression
    part_bytes: int = 64 << 20  # of source text that a part of local files holds, about
    workers: Any = "auto"  # processes (local) or tasks at a time (ray); auto: the cores available
    engine: str = "local"
    ray_address: str | None = None  # None: a cluster already running here, else one started for the build
    eval_fraction: float = 0.005
    stall_after: float = 120.0  # seconds without a row before a source is named as stalled
    retries: int = 6  # attempts in a row at a hub or an object store, with back-off from 1 s doubling to 60 s
    work: str | None = None  # folder for unfinished work; None: OUTPUT/.work, or ~/.cache/chimera for a remote output
    rebuild: bool = False  # replace an output that was built with other settings
    streams: dict[str, StreamSettings] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        return is_remote(self.output)

    @property
    def work_folder(self) -> Path:
        """Where unfinished work lies between runs; the same for every run of one output, and of no other.

        It is removed with the work, so it is never a folder of the user's.
        """
        if self.work is None and not self.remote:
            return Path(self.output).absolute() / ".work"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chimera"
        output = self.output.rstrip("/") if self.remote else os.path.realpath(self.output)
        return Path(self.work or cache).absolute() / f"build-{hashlib.sha256(output.encode()).hexdigest()[:16]}"

    @property
    def worker_count(self) -> int:
        return cores() if self.workers == "auto" else int(self.workers)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(settings: BuildSettings) -> dict[str, Any]:
    """The settings that decide the output, as JSON values; two builds with equal identities write equal bytes.

    The tokenizer stands in the manifest by its digest, so its path is left out.
    """
    shaping = {key: value for key, value in asdict(settings).items() if key not in _RUNNING}
    del shaping["tokenizer"]["path"]
    return shaping


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as `key: old -> new` lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys(), key=str)
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def settings_from(values: dict[str, Any]) -> BuildSettings:
    """The inverse of `asdict`, for a worker that reads the build's plan."""
    values = dict(values)
    values["tokenizer"] = TokenizerSettings(**values["tokenizer"])
    values["streams"] = {
        name: StreamSettings(**{**stream, "sources": [SourceSettings(**s) for s in stream["sources"]]})
        for name, stream in values["streams"].items()
    }
    return BuildSettings(**values)


def check(settings: BuildSettings) -> None:
    """Refuse, with the key and the remedy, what the types let through."""
    _check_build(settings)
    for name, stream in settings.streams.items():
        if not stream_name(name):
            raise UserError(
                f"streams.{name}: a stream's name is at most 128 letters, digits, `_` and `-` (in quotes where YAML "
                f"reads it as something else), and none of {', '.join(_TAKEN)}"
            )
        if stream.format == "chatml" and settings.tokenizer.eos_token == IM_END:
            raise UserError(
                f"tokenizer.eos_token: {IM_END} ends the messages of streams.{name} (format: chatml), so another "
                "special token must end documents: <|endoftext|> or one like it"
            )
        _check_stream(f"streams.{name}", stream)


def stream_name(name: str) -> bool:
    """Whether a stream may be called so: a folder of the output has that name."""
    return bool(_NAME.fullmatch(name)) and name not in _TAKEN


def _check_build(settings: BuildSettings) -> None:
    for key, value in (("output", settings.output), ("tokenizer.path", settings.tokenizer.path)):
        if not value:
            raise UserError(f"setting `{key}` is missing")
        _path(key, value)
    _path("work", settings.work or "")
    if settings.remote:
        check_writable(settings.output)
    if not settings.streams:
        raise UserError("`streams` is empty: name at least one stream and its sources")
    _positive("block_len", settings.block_len)
    if settings.block_len % 8:
        raise UserError(f"block_len: {settings.block_len} must be a multiple of 8")
    if settings.block_len >= 1 << 28:
        raise UserError(f"block_len: {settings.block_len} must be below 268435456 (MDS offsets are 32 bits)")
    for key in ("shard_bytes", "part_bytes", "retries"):
        _positive(key, getattr(settings, key))
    if settings.part_bytes < 1024:
        raise UserError(f"part_bytes: {settings.part_bytes} must be at least 1024")
    if settings.shard_bytes >= 1 << 31:
        raise UserError(f"shard_bytes: {settings.shard_bytes} must be below 2147483648 (MDS offsets are 32 bits)")
    if not settings.stall_after > 0:  # nan neither
        raise UserError(f"stall_after: {settings.stall_after} must be above 0 seconds")
    if settings.engine not in ENGINES:
        raise UserError(f"engine: `{settings.engine}` must be one of {', '.join(ENGINES)}")
    if settings.workers != "auto":
        _positive("workers", settings.workers)
    if not 0 <= settings.eval_fraction < 1:
        raise UserError(f"eval_fraction: {settings.eval_fraction} must be at least 0 and below 1")
    if not re.fullmatch(r"zstd(:([1-9]|1[0-9]|2[0-2]))?", settings.compression or "zstd"):
        raise UserError(f"compression: `{settings.compression}` must be null, zstd or zstd:1 to zstd:22")
    from convert.shards import known_hashes

    if settings.hash not in known_hashes():
        raise UserError(f"hash: `{settings.hash}` must be one of {', '.join(known_hashes())}")


def _check_stream(where: str, stream: StreamSettings) -> None:
    if stream.format not in FORMATS:
        raise UserError(f"{where}.format: `{stream.format}` must be one of {', '.join(FORMATS)}")
    if stream.packing not in PACKINGS:
        raise UserError(f"{where}.packing: `{stream.packing}` must be one of {', '.join(PACKINGS)}")
    if stream.max_tokens is not None:
        _positive(f"{where}.max_tokens", stream.max_tokens)
    for key in ("min_chars", "min_tokens"):
        if (getattr(stream, key) or 0) < 0:
            raise UserError(f"{where}.{key}: {getattr(stream, key)} must not be negative")
    if not stream.sources:
        raise UserError(f"{where}.sources is empty: give at least one of {{hub: ...}} or {{files: [...]}}")
    for index, source in enumerate(stream.sources):
        if bool(source.hub) == bool(source.files):
            raise UserError(f"{where}.sources.{index}: give either `hub` or `files`")
        if not all(isinstance(file, str) and file for file in source.files):
            raise UserError(f"{where}.sources.{index}.files: {source.files} must be paths")
        if source.files and source != SourceSettings(files=source.files, column=source.column):
            raise UserError(
                f"{where}.sources.{index}: `subset`, `data_dir`, `split` and `revision` are for `hub`; files have none"
            )


def _path(key: str, value: str) -> None:
    if value.startswith("~") or "\0" in value:
        raise UserError(f"{key}: {value!r} must be a path as it is, without ~ or a NUL")


def _positive(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key}: {value!r} must be a whole number above 0")
