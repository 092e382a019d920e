"""Finished parts → the output: sums checked, shards first, each index behind its shards, the manifest last of all.

Every step can be done again, so a build killed while publishing goes on publishing.
"""

import json
import os
import shutil
from pathlib import Path

from chimera.cli import UserError
from convert import journal
from convert.journal import SPLITS, PartState, all_shard_keys, shard_keys
from convert.outputs import Output
from convert.planned import PlannedBuild, StreamPlan
from convert.settings import BuildSettings
from convert.shards import Json, digest, file_of, index_bytes
from convert.sources import changed_files


def publish(plan: Json, build: PlannedBuild, parts: dict[str, list[PartState]], work: Path, output: Output) -> Json:
    """Bring everything to the output; returns the manifest."""
    check_sources(plan)
    manifest = make_manifest(plan, build.settings, parts)
    check_sums(manifest)
    check_streams(manifest)
    _adopt(build, parts, work, output)
    for name, states in parts.items():
        stream = build.streams[name]
        for index in range(len(states), len(stream.parts)):  # parts that ran ahead of `max_tokens`
            for key in all_shard_keys(name, journal.load(stream.part_folder(work, index))[0]):
                output.discard(key)
        for split in SPLITS:
            entries = [entry for state in states for entry in state.splits[split].shards]
            if entries:
                output.write(f"{name}/{split}/index.json", index_bytes(entries))
            output.prune(f"{name}/{split}", [file_of(entry)["basename"] for entry in entries])
        output.put(collect_rejects(stream, states, work), f"rejects/{name}.jsonl.zst")
    output.write("tokenizer/tokenizer.json", (work / "tokenizer.json").read_bytes())
    output.write("manifest.json", manifest_bytes(manifest))
    output.release()
    return manifest


def _adopt(build: PlannedBuild, parts: dict[str, list[PartState]], work: Path, output: Output) -> None:
    """Bring the shards to the output; a part one of whose shards was there and is no more is to be made again."""
    lost: dict[Path, str] = {}
    for name, states in parts.items():
        for index, state in enumerate(states):
            folder = build.streams[name].part_folder(work, index)
            for split in SPLITS:
                for entry, key in zip(state.splits[split].shards, shard_keys(name, split, state), strict=True):
                    if not output.adopt(folder / split / file_of(entry)["basename"], key, entry):
                        lost[folder] = key
    for folder in lost:
        shutil.rmtree(folder)
    if lost:
        raise UserError(
            f"{output.name}/{min(lost.values())} is missing or damaged since it was published: run the same command "
            "again, which makes it anew"
        )


def make_manifest(plan: Json, settings: BuildSettings, parts: dict[str, list[PartState]]) -> Json:
    """The manifest of the given parts, without anything that differs between two builds of the same output."""
    tokenizer = dict(plan["tokenizer"])
    dtype = tokenizer.pop("dtype")
    return {
        "format": 1,
        "block_len": settings.block_len,
        "dtype": dtype,
        "compression": settings.compression,
        "hash": settings.hash,
        "tokenizer": tokenizer,
        "streams": {
            name: {
                "format": settings.streams[name].format,
                "packing": settings.streams[name].packing,
                "source": plan["streams"][name]["source"],
                "encoder": plan["streams"][name]["encoder"],
                "max_token_id": max((part.max_token_id for part in states), default=-1),
                "rows": {
                    "read": sum(part.read for part in states),
                    "documents": sum(part.documents for part in states),
                    "filtered": _sum([part.filtered for part in states]),
                    "rejected": _sum([part.rejected for part in states]),
                },
                **{split: _split_summary(split, states) for split in SPLITS},
            }
            for name, states in parts.items()
        },
        "settings": plan["settings"],
    }


def _split_summary(split: str, parts: list[PartState]) -> Json:
    states = [part.splits[split] for part in parts]
    entries = [entry for state in states for entry in state.shards]
    return {
        "documents": sum(state.documents for state in states),
        "tokens": sum(state.tokens for state in states),
        "padding": sum(state.padding for state in states),
        "blocks": sum(state.blocks for state in states),
        "shards": len(entries),
        "index": digest("sha256", index_bytes(entries)) if entries else None,
    }


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for count in counts for reason in count})
    return {reason: sum(count.get(reason, 0) for count in counts) for reason in reasons}


def check_sources(plan: Json) -> None:
    """Refuse to publish what was read of a file while it grew or shrank: rows of it are missing, or one is cut."""
    for name, stream in plan["streams"].items():
        describe = stream["source"]["describe"]
        sizes = {file["path"]: file["bytes"] for file in describe.get("files", [])}
        for file in changed_files(describe):
            raise UserError(
                f"streams.{name}: the size of {file} changed while it was read, so nothing is published: cut it back "
                f"to {sizes[file]} bytes and run the same command again, or set `rebuild=true` once it is whole"
            )


def check_sums(manifest: Json) -> None:
    """Every row accounted for, every token in a block; a difference is a defect, and nothing is published."""
    for name, stream in manifest["streams"].items():
        rows = stream["rows"]
        dropped = sum(rows["filtered"].values()) + sum(rows["rejected"].values())
        _equal(name, "rows", rows["read"], rows["documents"] + dropped)
        _equal(name, "documents", rows["documents"], sum(stream[split]["documents"] for split in SPLITS))
        for split in SPLITS:
            found = stream[split]
            _equal(name, f"{split} tokens", found["blocks"] * manifest["block_len"], found["tokens"] + found["padding"])


def check_streams(manifest: Json) -> None:
    """Refuse to publish a stream without a single document: its column or format is not that of its source."""
    for name, stream in manifest["streams"].items():
        if not stream["train"]["documents"]:
            rows = stream["rows"]
            kept = {"set aside by `eval_fraction`": stream["eval"]["documents"]} if stream["eval"]["documents"] else {}
            found = {**kept, **rows["filtered"], **rows["rejected"]}
            counts = ", ".join(f"{n} {reason}" for reason, n in found.items())
            raise UserError(
                f"streams.{name}: no document for training in {rows['read']} rows ({counts or 'no row'}): mend its "
                "`format`, `column` or `sources` and set `rebuild=true`"
            )


def _equal(stream: str, what: str, left: int, right: int) -> None:
    if left != right:
        raise RuntimeError(f"{stream}: the {what} do not add up: {left} against {right}: nothing was published")


def manifest_bytes(manifest: Json) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def collect_rejects(plan: StreamPlan, parts: list[PartState], work: Path) -> Path:
    """The reject file of a stream: those of its parts in order, lines counted from the start of their file."""
    import zstandard

    lines_before: dict[str, int] = {}  # physical lines of each file in the spans so far
    collected = work / "rejects.jsonl.zst"
    with open(collected, "wb") as out:
        # With a checksum, so that damage is noticed: the manifest holds no hash of this file.
        packed = zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(out, closefd=False)
        for index, state in enumerate(parts):
            bases = []
            for span, lines in zip(plan.parts[index].spans, state.lines, strict=False):
                bases.append(lines_before.get(span.file, 0))
                lines_before[span.file] = bases[-1] + lines
            with open(plan.part_folder(work, index) / "rejects.jsonl", "rb") as file:
                for line in file:
                    place, _, text = line.partition(b" ")
                    reject = json.loads(text)
                    if "line" in reject:
                        reject["line"] += bases[int(place)]
                    packed.write(json.dumps(reject).encode() + b"\n")
        packed.close()
        out.flush()
        os.fsync(out.fileno())
    return collected
