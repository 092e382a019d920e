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
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from chimera.chatml import IM_END, IM_START
from chimera.cli import counted, one_line, progress, run, say
from convert.block_rules import BlockRules, ChatRules
from convert.built import COUNTS, PLAIN_NAME, Bad, Root, form_of, read_manifest
from convert.journal import SPLITS
from convert.reading import Position, Span, open_lines
from convert.shards import Array, Json, ShardFormat, digest, file_of


@dataclass
class Found:
    """What the blocks of one split hold."""

    blocks: int = 0
    tokens: int = 0
    padding: int = 0
    documents: int = 0
    max_token_id: int = -1

    def add(self, tokens: Array, eos_id: int, pad_id: int) -> None:
        real = tokens[tokens != pad_id]
        self.blocks += len(tokens)
        self.tokens += len(real)
        self.padding += tokens.size - len(real)
        self.documents += int((real == eos_id).sum())
        self.max_token_id = max(self.max_token_id, int(real.max(initial=0)))


def verify(root: Root, manifest: Json) -> list[str]:
    """Everything that is wrong, one sentence each, naming the file."""
    from tokenizers import Tokenizer

    problems: list[str] = []
    stated = manifest["tokenizer"]
    try:
        raw = root.read("tokenizer/tokenizer.json")
    except Bad as bad:
        return [str(bad)]
    if hashlib.sha256(raw).hexdigest() != stated["digest"]:
        return ["tokenizer/tokenizer.json: not the tokenizer of the manifest"]
    tokenizer = Tokenizer.from_buffer(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # in its words: encode their text
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    problems += _differs("tokenizer", "vocab_size", size, stated["vocab_size"])
    for mark in ("eos", "pad"):
        id_ = tokenizer.token_to_id(stated[f"{mark}_token"])
        problems += _differs("tokenizer", f"{mark}_id", id_, stated[f"{mark}_id"])
    total = sum(manifest["streams"][name][split]["blocks"] for name in manifest["streams"] for split in SPLITS)
    with progress(total, "block", "verify") as bar:
        for name, stream in manifest["streams"].items():
            rules = _rules(stated, tokenizer, stream)
            highest = -1
            for split in SPLITS:
                found = Found()
                for tokens in _blocks(root, manifest, name, split, rules, problems):
                    if not found.blocks and len(tokens):
                        _show(name, split, tokens[0], rules, tokenizer)
                    found.add(tokens, rules.eos_id, rules.pad_id)
                    bar.update(len(tokens))
                for key in COUNTS:
                    problems += _differs(f"{name}/{split}", key, getattr(found, key), stream[split][key])
                highest = max(highest, found.max_token_id)
            problems += _differs(name, "largest token id", highest, stream["max_token_id"])
            problems += _rows(root, name, stream)
    return problems or [f"{name}: not of this build" for name in root.strays(manifest["streams"])]


def _rules(tokenizer: Json, loaded: Any, stream: Json) -> BlockRules:
    added = loaded.get_added_tokens_decoder().items()
    special = {id_ for id_, token in added if token.special}
    chat = None
    if stream["format"] == "chatml":
        header = loaded.encode("assistant\n", add_special_tokens=False).ids
        chat = ChatRules(loaded.token_to_id(IM_START), loaded.token_to_id(IM_END), tuple(header))
    return BlockRules(tokenizer["vocab_size"], tokenizer["eos_id"], tokenizer["pad_id"], frozenset(special), chat)


def _blocks(
    root: Root, manifest: Json, stream: str, split: str, rules: BlockRules, problems: list[str]
) -> Iterator[Array]:
    """The tokens [blocks, block_len] of each shard that can be read; what is wrong is added to `problems`."""
    summary = manifest["streams"][stream][split]
    if not summary["shards"]:
        return
    folder = f"{stream}/{split}"
    try:
        index = root.read(f"{folder}/index.json")
        if hashlib.sha256(index).hexdigest() != summary["index"]:
            raise Bad(f"{folder}/index.json: its SHA-256 is not the manifest's")
    except Bad as bad:
        problems.append(str(bad))
        return
    form = form_of(manifest, manifest["streams"][stream])
    shards = json.loads(index)["shards"]
    problems += _differs(folder, "shards", len(shards), summary["shards"])
    for shard in shards:
        root.seen.add(f"{folder}/{shard['raw_data']['basename']}")  # streaming's readers leave it beside the compressed
        try:
            tokens, masks = read_shard(root, folder, shard, form)
        except Bad as bad:
            problems.append(str(bad))
        else:
            name = f"{folder}/{file_of(shard)['basename']}"
            problems += [f"{name}: {what}" for what in rules.broken(tokens, masks)]
            yield tokens


def read_shard(root: Root, folder: str, shard: Json, form: ShardFormat) -> tuple[Array, Array | None]:
    """Tokens and masks [blocks, block_len] of a shard whose every byte was checked."""
    stored = file_of(shard)
    name = f"{folder}/{stored['basename']}"
    if not PLAIN_NAME.fullmatch(stored["basename"]):
        raise Bad(f"{folder}/index.json: {stored['basename']!r} is not a file name")
    data = root.read(name)
    _check_bytes(name, data, stored)
    if shard["zip_data"]:
        import zstandard

        try:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=shard["raw_data"]["bytes"])
        except zstandard.ZstdError as error:
            raise Bad(f"{name}: {error}") from None
        _check_bytes(f"{name}, decompressed", data, shard["raw_data"])
    return _columns(name, data, shard, form)


def _check_bytes(name: str, data: bytes, wanted: Json) -> None:
    if len(data) != wanted["bytes"]:
        raise Bad(f"{name}: {len(data)} bytes, the index says {wanted['bytes']}")
    for algorithm, value in wanted["hashes"].items():
        if (found := digest(algorithm, data)) != value:
            raise Bad(f"{name}: {algorithm} is {found}, the index says {value}")


def _columns(name: str, data: bytes, shard: Json, form: ShardFormat) -> tuple[Array, Array | None]:
    """A raw MDS file by hand: [samples][offsets][config] and records of equal length."""
    for key, wanted in form.config.items():
        if shard.get(key) != wanted:
            raise Bad(f"{name}: its {key} is {shard.get(key)} in the index where {wanted} is expected")
    samples, masks = shard["samples"], form.block_len // 8 if form.masked else 0
    record = sum(size for _, _, size in form.columns)
    offsets = np.frombuffer(data, "<u4", samples + 1, offset=4) if len(data) >= 8 + 4 * samples else np.empty(0)
    first = len(data) - samples * record
    if int.from_bytes(data[:4], "little") != samples or not np.array_equal(
        offsets, first + record * np.arange(samples + 1)
    ):
        raise Bad(f"{name}: its table of records is not that of {samples} blocks of {record} bytes")
    records = np.frombuffer(data, np.uint8, offset=first).reshape(samples, record)
    tokens = np.ascontiguousarray(records[:, masks:]).view(np.dtype(form.dtype).newbyteorder("<"))
    if not form.masked:
        return tokens, None
    return tokens, np.unpackbits(records[:, :masks], axis=1, bitorder="little").astype(bool)


def _rows(root: Root, name: str, stream: Json) -> list[str]:
    """Whether the rows add up and the reject file holds those that were rejected."""
    rows = stream["rows"]
    dropped = sum(rows["filtered"].values()) + sum(rows["rejected"].values())
    problems = _differs(name, "rows read", rows["documents"] + dropped, rows["read"])
    problems += _differs(
        name, "documents", stream["train"]["documents"] + stream["eval"]["documents"], rows["documents"]
    )
    file = f"rejects/{name}.jsonl.zst"
    try:
        packed: Any = io.BufferedReader(io.BytesIO(root.read(file)))
        lines, _ = open_lines(Span("jsonl", file, 0, None, 0), packed, Position())  # which notices a cut-off end
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    except (Bad, EOFError, ValueError, KeyError) as error:
        return [*problems, str(error) if isinstance(error, Bad) else f"{file}: damaged: {one_line(error)}"]
    return problems + (
        [] if dict(reasons) == rows["rejected"] else [f"{file}: holds {dict(reasons)}, not {rows['rejected']}"]
    )


def _differs(where: str, what: str, found: int | None, wanted: int) -> list[str]:
    """A sentence when a count is not the manifest's."""
    return [] if found == wanted else [f"{where}: {what}: found {found}, the manifest says {wanted}"]


def _show(name: str, split: str, block: Array, rules: BlockRules, tokenizer: Any) -> None:
    text = tokenizer.decode(block[block != rules.pad_id][:48].tolist(), skip_special_tokens=False)
    say(f"{name}/{split} begins: {one_line(text)}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="verify_shards.py",
        description="Check every byte and count of a finished build; exits 1 when one is wrong.",
    )
    parser.add_argument("root", metavar="ROOT", help="the build's output: a folder or an object-store URL")
    where = parser.parse_args(argv).root
    with tempfile.TemporaryDirectory() as scratch:
        root = Root(where, Path(scratch))
        manifest = read_manifest(root)
        problems = verify(root, manifest)
    if problems:
        print(
            f"{root.root}: {counted(len(problems), 'problem')}: remove its manifest.json and build it again with "
            "`rebuild=true`",
            file=sys.stderr,
        )
        with contextlib.suppress(BrokenPipeError):  # `… | head` makes no good root of it
            print(*(f"bad: {problem}" for problem in problems), sep="\n", flush=True)
        return 1
    blocks = sum(stream[split]["blocks"] for stream in manifest["streams"].values() for split in SPLITS)
    holds = f"{counted(len(manifest['streams']), 'stream')}, {counted(blocks, 'block')}"
    print(f"{where}: {holds}: every byte and count is as the manifest says")
    return 0


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
