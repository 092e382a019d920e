"""Entry point: is every byte and every count of a finished build as the manifest says?

Reads manifest, indexes, shards and reject files of a local or remote output without streaming's readers: hashes
stored and raw, counts, ids, padding, ends of documents, assistant masks, and shows a decoded piece of each stream. Of
a folder, whatever else lies with the shards is wrong too.
Exits with 1 when something is wrong, and with 2 when it cannot tell (no manifest, a store out of reach).
"""

import argparse
import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError, progress, run, say, show
from chimera.convert.read.reading import Position, Span, open_lines
from chimera.convert.verify.block_rules import BlockRules, ChatRules, TemplateRules
from chimera.convert.verify.proofs import proof_problems
from chimera.convert.verify.root import Root, VerifyError, read_manifest
from chimera.manifest import Manifest, Stream, Tokenizer
from chimera.mds import Array, Json, ShardFormat, digest, file_of
from chimera.text import counted, one_line
from chimera.tokenizer_file import load

FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
COUNTS = ("blocks", "tokens", "padding", "documents")  # of a split


@dataclass
class Found:
    """What the blocks of one split hold.

    `documents` are those that end there, at most: an EOS at a block's end, of which the masks of no other block say
    whether its document goes on, is `unsure`.
    """

    blocks: int = 0
    tokens: int = 0
    padding: int = 0
    documents: int = 0
    max_token_id: int = -1
    unsure: int = 0
    ended: bool = False  # whether the last block ended with EOS

    def add(self, tokens: Array, masks: Array | None, rules: BlockRules) -> None:
        padding = rules.padding(tokens)
        real = tokens[~padding]
        self.blocks += len(tokens)
        self.tokens += len(real)
        self.padding += tokens.size - len(real)
        self.documents += int((rules.ends(tokens, masks) & ~padding).sum())
        if rules.starts and masks is not None:
            last = (tokens[:, -1] == rules.eos_id) & ~padding[:, -1]
            if rules.joined:
                goes_on = ~masks[:, 0] & (tokens[:, 0] != rules.eos_id)
                self.documents -= int((goes_on & np.append(self.ended, last[:-1])).sum())
                self.ended = bool(last[-1])
            elif isinstance(rules.chat, TemplateRules) and not rules.chat.whole:
                self.unsure += int(last.sum())
        self.max_token_id = max(self.max_token_id, int(real.max(initial=0)))


def verify(root: Root, manifest: Manifest) -> list[str]:
    """Everything that is wrong, one sentence each, naming the file."""
    problems: list[str] = []
    stated = manifest.tokenizer
    try:
        raw = root.read("tokenizer/tokenizer.json")
    except VerifyError as error:
        return [str(error)]
    if hashlib.sha256(raw).hexdigest() != stated.digest:
        return ["tokenizer/tokenizer.json: not the tokenizer of the manifest"]
    tokenizer = load(raw)
    tokenizer.encode_special_tokens = True  # in its words: encode their text
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    problems += _differs("tokenizer", "vocab_size", size, stated.vocab_size)
    for mark in ("eos",) if stated.pad_token is None else ("eos", "pad"):
        id_ = tokenizer.token_to_id(getattr(stated, f"{mark}_token"))
        problems += _differs("tokenizer", f"{mark}_id", id_, getattr(stated, f"{mark}_id"))
    known = not problems  # the tokenizer, by which proofs are made again
    with progress(manifest.blocks, "block", "verify") as bar:
        for name, stream in manifest.streams.items():
            rules = _rules(stated, tokenizer, stream)
            highest = -1
            for split, counts in stream.splits.items():
                found = Found()
                for tokens, masks in _blocks(root, manifest, name, split, rules, problems):
                    if not found.blocks:
                        _show(name, split, tokens[0], rules, tokenizer)
                    found.add(tokens, masks, rules)
                    bar.update(len(tokens))
                if found.documents - found.unsure <= counts.documents < found.documents:
                    found.documents = counts.documents
                for key in COUNTS:
                    problems += _differs(f"{name}/{split}", key, getattr(found, key), getattr(counts, key))
                highest = max(highest, found.max_token_id)
            problems += _differs(name, "largest token id", highest, stream.max_token_id)
            problems += _rows(root, name, stream)
            if stream.proof and known:
                problems += proof_problems(root, name, manifest, raw)
    return problems or [f"{name}: not of this build" for name in root.strays(manifest.streams)]


def _rules(tokenizer: Tokenizer, loaded: Any, stream: Stream) -> BlockRules:
    added = loaded.get_added_tokens_decoder().items()
    special = {id_ for id_, token in added if token.special}
    chat: ChatRules | TemplateRules | None = None
    rests = stream.packing == "best_fit"
    if stream.template:
        ends = {id_ for id_, token in added if token.special or token.content in stream.template.control}
        whole = stream.packing != "concat" and not stream.too_long.get("cut")
        chat = TemplateRules(frozenset(ends), whole, rests)
    if stream.format == "chatml":
        header = loaded.encode("assistant\n", add_special_tokens=False).ids
        ids = loaded.token_to_id(IM_START), loaded.token_to_id(IM_END)
        chat = ChatRules(*ids, tuple(header), untrained=bool(stream.turns.get("untrained")))
    bos = tuple(tokenizer.bos) if stream.format == "text" else ()
    special = set() if stream.template else special  # it may write any of them
    marks = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
    return BlockRules(*marks, frozenset(special), chat, bos, rests, stream.starts, stream.packing == "concat")


def _blocks(
    root: Root, manifest: Manifest, stream: str, split: str, rules: BlockRules, problems: list[str]
) -> Iterator[tuple[Array, Array | None]]:
    """The tokens and masks [blocks, block_len] of each shard that can be read; what is wrong is added to `problems`."""
    stated = manifest.streams[stream].splits[split]
    if not stated.shards:
        return
    folder = f"{stream}/{split}"
    try:
        index = root.read(f"{folder}/index.json")
        if hashlib.sha256(index).hexdigest() != stated.index:
            raise VerifyError(f"{folder}/index.json: its SHA-256 is not the manifest's")
    except VerifyError as error:
        problems.append(str(error))
        return
    shard_format = manifest.shard_format(stream)
    shards = json.loads(index)["shards"]
    problems += _differs(folder, "shards", len(shards), stated.shards)
    for shard in shards:
        root.seen.add(f"{folder}/{shard['raw_data']['basename']}")  # streaming's readers leave it beside the compressed
        try:
            tokens, masks = read_shard(root, folder, shard, shard_format)
        except VerifyError as error:
            problems.append(str(error))
        else:
            name = f"{folder}/{file_of(shard)['basename']}"
            problems += [f"{name}: {what}" for what in rules.broken(tokens, masks)]
            if len(tokens):
                yield tokens, masks


def read_shard(root: Root, folder: str, shard: Json, shard_format: ShardFormat) -> tuple[Array, Array | None]:
    """Tokens and masks [blocks, block_len] of a shard whose every byte was checked."""
    stored = file_of(shard)
    name = f"{folder}/{stored['basename']}"
    if not FILE_NAME.fullmatch(stored["basename"]):
        raise VerifyError(f"{folder}/index.json: {stored['basename']!r} is not a file name")
    data = root.read(name)
    _check_bytes(name, data, stored)
    if shard["zip_data"]:
        import zstandard

        try:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=shard["raw_data"]["bytes"])
        except zstandard.ZstdError as error:
            raise VerifyError(f"{name}: {error}") from None
        _check_bytes(f"{name}, decompressed", data, shard["raw_data"])
    return _columns(name, data, shard, shard_format)


def _check_bytes(name: str, data: bytes, wanted: Json) -> None:
    if len(data) != wanted["bytes"]:
        raise VerifyError(f"{name}: {len(data)} bytes, the index says {wanted['bytes']}")
    for algorithm, value in wanted["hashes"].items():
        if (found := digest(algorithm, data)) != value:
            raise VerifyError(f"{name}: {algorithm} is {found}, the index says {value}")


def _columns(name: str, data: bytes, shard: Json, shard_format: ShardFormat) -> tuple[Array, Array | None]:
    """A raw MDS file by hand: [samples][offsets][config] and records of equal length."""
    for key, wanted in shard_format.config.items():
        if shard.get(key) != wanted:
            raise VerifyError(f"{name}: its {key} is {shard.get(key)} in the index where {wanted} is expected")
    samples, masks = shard["samples"], shard_format.block_len // 8 if shard_format.masked else 0
    record = sum(size for _, _, size in shard_format.columns)
    offsets = np.frombuffer(data, "<u4", samples + 1, offset=4) if len(data) >= 8 + 4 * samples else np.empty(0)
    first = len(data) - samples * record
    if int.from_bytes(data[:4], "little") != samples or not np.array_equal(
        offsets, first + record * np.arange(samples + 1)
    ):
        raise VerifyError(f"{name}: its table of records is not that of {samples} blocks of {record} bytes")
    records = np.frombuffer(data, np.uint8, offset=first).reshape(samples, record)
    tokens = np.ascontiguousarray(records[:, masks:]).view(np.dtype(shard_format.dtype).newbyteorder("<"))
    if not shard_format.masked:
        return tokens, None
    return tokens, np.unpackbits(records[:, :masks], axis=1, bitorder="little").astype(bool)


def _rows(root: Root, name: str, stream: Stream) -> list[str]:
    """Whether the rows add up and the reject file holds those that were rejected."""
    rows = stream.rows
    more = stream.turns.get("each", 0)  # documents than rows
    problems = _differs(name, "rows read", rows.documents + rows.dropped - more, rows.read)
    problems += _differs(name, "documents", stream.train.documents + stream.eval.documents, rows.documents)
    file = f"rejects/{name}.jsonl.zst"
    try:
        packed: Any = io.BufferedReader(io.BytesIO(root.read(file)))
        lines, _ = open_lines(Span("jsonl", file, 0, None, 0), packed, Position())  # which notices a cut-off end
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    except (VerifyError, EOFError, ValueError, KeyError) as error:
        return [*problems, str(error) if isinstance(error, VerifyError) else f"{file}: damaged: {one_line(error)}"]
    return problems + (
        [] if dict(reasons) == rows.rejected else [f"{file}: holds {dict(reasons)}, not {rows.rejected}"]
    )


def _differs(where: str, what: str, found: int | None, wanted: int) -> list[str]:
    """A sentence when a count is not the manifest's."""
    return [] if found == wanted else [f"{where}: {what}: found {found}, the manifest says {wanted}"]


def _show(name: str, split: str, block: Array, rules: BlockRules, tokenizer: Any) -> None:
    held = block[~rules.padding(block[None])[0]]
    text = tokenizer.decode(held[:48].tolist(), skip_special_tokens=False)
    say(f"{name}/{split} begins: {text}")


def verify_shards(root: str | Path) -> None:
    """Check every byte and count of a finished build, in a folder or an object store.

    Raises `UserError` with the first thing that is wrong and how many there are, or when it cannot tell.
    """
    where = Root(str(root))
    if problems := verify(where, read_manifest(where)):
        raise UserError(f"{_refusal(where, problems)} (the first: {problems[0]})")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="verify_shards.py",
        description="Check every byte and count of a finished build; exits 1 when one is wrong.",
    )
    parser.add_argument("root", metavar="ROOT", help="the build's output: a folder or an object-store URL")
    where = parser.parse_args(argv).root
    root = Root(where)
    manifest = read_manifest(root)
    problems = verify(root, manifest)
    if problems:
        say(_refusal(root, problems))
        with contextlib.suppress(BrokenPipeError):  # `… | head` makes no good root of it
            print(*(f"bad: {one_line(problem)}" for problem in problems), sep="\n", flush=True)
        return 1
    holds = f"{counted(len(manifest.streams), 'stream')}, {counted(manifest.blocks, 'block')}"
    show(f"{one_line(where)}: {holds}: every byte and count is as the manifest says")
    return 0


def _refusal(root: Root, problems: list[str]) -> str:
    """How many things are wrong, and what to do."""
    return (
        f"{root.root}: {counted(len(problems), 'problem')}: remove its manifest.json and build it again with "
        "`rebuild=true`"
    )


def entry() -> None:
    run(main)
