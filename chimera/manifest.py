"""`manifest.json`: what a finished build holds and how it was made; read, checked and written here alone.

A build writes it last of all, so a root that has one is whole. Keys that this version does not know are ignored.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from chimera.mds import SPLITS, Json, ShardFormat, digest
from chimera.text import json_text, one_line

Count = Annotated[int, Field(ge=0, lt=1 << 48)]  # rows, tokens, blocks: no build has more
Counts = dict[str, Count]
NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # of a stream, which is a folder's: a file's name has at most 255 bytes
OTHER_FOLDERS = frozenset({"rejects", "tokenizer", "proof"})  # of an output: no stream may have their names


class NotAManifest(ValueError):
    """JSON that is not a manifest, with what is wrong in one line."""


class Entry(BaseModel):
    """A part of the manifest; values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True)


class Split(Entry):
    """The train or the eval split of a stream; `tokens` are without padding."""

    documents: Count
    tokens: Count
    padding: Count
    blocks: Count
    shards: Count
    index: str | None  # SHA-256 of its index.json; None: it has no shard


class Rows(Entry):
    """What became of the rows of a stream's source: documents, and by reason what was filtered or rejected."""

    read: Count
    documents: Count
    filtered: Counts
    rejected: Counts

    @property
    def dropped(self) -> int:
        return sum(self.filtered.values()) + sum(self.rejected.values())


class Source(Entry):
    """The source in use: which of the stream's it is, its files or hub set, and why those before it are not used."""

    index: Count
    describe: Any
    passed_over: list[Json]


class EncoderPath(Entry):
    """Which encoder a stream's ids came from, and why."""

    path: str
    reason: str


class Tokenizer(Entry):
    digest: str  # SHA-256 of tokenizer.json
    vocab_size: Count  # largest id + 1
    eos_token: str
    eos_id: Count
    pad_token: str | None  # None: no block is padded but a part's last, which EOS fills up
    pad_id: Count | None
    bos: list[Count] = []  # what each text begins with; left out where that is nothing

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> Json:
        return {key: value for key, value in serialize(self).items() if value != []}


class ChatTemplate(Entry):
    """The template of a stream of conversations, with all that its renderings depend on.

    `texts` are by name, as `get_chat_template` chooses between them. `tokens` are the tokenizer's named ones, as the
    template may write them, `date` is the day it may write. `control` are the tokens that are never found in contents,
    `turn_end` is the one that ends the assistant's turns, if all are ended by the same. `eos_inside`: EOS is one of
    the tokens inside of a conversation, so that the masks say where documents start (`ShardFormat.starts`).
    """

    digest: str  # SHA-256 of the texts and the named tokens
    texts: dict[str, str]
    tokens: dict[str, str]
    date: str | None
    control: list[str]
    turn_end: str | None
    eos_inside: bool = False  # left out where it is not so

    @model_serializer(mode="wrap")
    def _without_usual(self, serialize: SerializerFunctionWrapHandler) -> Json:
        return {key: value for key, value in serialize(self).items() if key != "eos_inside" or value}


class Stream(Entry):
    format: str
    packing: str
    source: Source
    encoder: EncoderPath
    max_token_id: Annotated[int, Field(ge=-1)]  # -1: no token is known
    rows: Rows
    train: Split
    eval: Split
    proof: str | None = None  # SHA-256 of proof/STREAM.jsonl.zst; this and the next seven are left out where empty
    template: ChatTemplate | None = None
    ignored: Counts = {}  # fields of its rows that are not read
    shapes: Counts = {}  # of its conversations
    too_long: Counts = {}  # conversations longer than a block, by what was done with them
    eval_source: Source | None = None  # of its own validation set
    overlap: Counts = {}  # rows trained on that are in it too
    turns: Counts = {}  # of the assistant, but not learned: `untrained`, or why not; `each`: more documents than rows

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> Json:
        optional = ("proof", "template", "eval_source", "overlap", "ignored", "shapes", "too_long", "turns")
        return {key: value for key, value in serialize(self).items() if value or key not in optional}

    @classmethod
    def from_index(
        cls, index: str, shards: int, blocks: int, block_len: int, where: str, largest: int = -1
    ) -> "Stream":
        """A stream of which no more is known than its train index (SHA-256): joined texts that fill every block."""
        nothing = {"documents": 0, "padding": 0}
        return cls(
            format="text",
            packing="concat",
            source=Source(index=0, describe=where, passed_over=[]),
            encoder=EncoderPath(path="", reason="not known"),
            max_token_id=largest,
            rows=Rows(read=0, documents=0, filtered={}, rejected={}),
            train=Split(**nothing, tokens=blocks * block_len, blocks=blocks, shards=shards, index=index),
            eval=Split(**nothing, tokens=0, blocks=0, shards=0, index=None),
        )

    @property
    def starts(self) -> bool:
        """Whether its masks say where documents start, which its EOS alone does not."""
        return self.template is not None and self.template.eos_inside

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}


class Manifest(Entry):
    """The whole of it; `settings` are those that decide the output, as JSON values."""

    format: Literal[1, 2]  # 2: of some stream the masks say where documents start, which readers of 1 do not know
    block_len: Count
    dtype: Annotated[str, Field(pattern="^uint(16|32)$")]  # of the tokens as stored, by its numpy name
    compression: str | None
    hash: str
    tokenizer: Tokenizer
    streams: dict[str, Stream]
    settings: Json

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        if bad := [name for name in self.streams if not NAME.fullmatch(name) or name in OTHER_FOLDERS]:
            raise ValueError(f"{bad[0]!r} is no name of a stream")
        sources = [
            (name, each) for name, stream in self.streams.items() for each in (stream.source, stream.eval_source)
        ]
        if bad := [name for name, source in sources if source and not _is_source(source.describe)]:
            raise ValueError(f"what it says of the source of {bad[0]!r} is damaged")
        if self.streams.keys() != self.settings["streams"].keys():
            raise ValueError("its streams are not those of its settings")
        if bad := [
            name for name, stream in self.streams.items() if not _is_among(stream, self.settings["streams"][name])
        ]:
            raise ValueError(f"the source of {bad[0]!r} is none of its settings'")
        if any(self.settings[key] != getattr(self, key) for key in ("block_len", "compression", "hash")):
            raise ValueError("what it says of all shards is not what its settings say")
        if type(self.settings["shard_bytes"]) is not int:
            raise ValueError("its shard_bytes is not a number")
        return self

    @property
    def blocks(self) -> int:
        return sum(split.blocks for stream in self.streams.values() for split in stream.splits.values())

    def shard_format(self, stream: str) -> ShardFormat:
        """How the shards of a stream must look."""
        found, size = self.streams[stream], self.settings["shard_bytes"]
        masked = found.format != "text"
        return ShardFormat(self.block_len, self.dtype, masked, self.compression, self.hash, size, found.starts)

    def as_bytes(self) -> bytes:
        value = self.model_dump()
        return json_text({**value, "sha256": _sum_of(value)}, sort_keys=True, indent=1).encode() + b"\n"


def _sum_of(value: Json) -> str:
    """The hash of a manifest as JSON, without the hash it holds."""
    return digest("sha256", json.dumps(value, sort_keys=True).encode())


def _is_among(stream: Stream, settings: Any) -> bool:
    """Whether the sources that a stream was built from are in the lists of its settings, where those have some."""
    if not isinstance(settings, dict):  # of shards that no build made
        return True
    own, held_out = settings.get("sources"), settings.get("eval_sources")
    found = [(stream.source, own or held_out), (stream.eval_source, held_out)]
    return all(source is None or not among or source.index < len(among) for source, among in found)


def _is_source(describe: Any) -> bool:
    """Whether a source is described as builds do, or in a word (no build's).

    Builds name files by path and bytes, and say of those that are a document each how many they are, and their bytes.
    """
    if isinstance(describe, str):
        return True
    if not isinstance(describe, dict):
        return False
    files, texts = describe.get("files", []), describe.get("texts", {"files": 0, "bytes": 0})
    if not isinstance(texts, dict) or any(type(texts.get(key)) is not int for key in ("files", "bytes")):
        return False
    return isinstance(files, list) and all(
        isinstance(file, dict) and isinstance(file.get("path"), str) and type(file.get("bytes")) is int
        for file in files
    )


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in the bytes of a file. Raises `NotAManifest`, or another `ValueError` for one that is damaged."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    try:
        found = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise NotAManifest(one_line(f"{where}: {what}" if where else what)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise NotAManifest(one_line(f"its settings are damaged: {error!r}")) from None
    if value.pop("sha256", None) not in (None, _sum_of(value)):  # None: of an earlier version
        raise ValueError("its `sha256` is not that of the rest: take the key out if you changed the file yourself")
    return found
