"""Finished parts → the output: sums checked, shards first, each index after its shards, the manifest last of all.

Every step can be done again, so a build killed while publishing goes on publishing.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TypeVar

import zstandard

from chimera.cli import UserError
from chimera.convert.build import part_state
from chimera.convert.build.growth import merged
from chimera.convert.build.outputs import Output, update_manifest
from chimera.convert.build.part_state import EVAL, PartState, all_shard_keys, shard_keys
from chimera.convert.build.plan import BuildPlan, StreamPlan, tokenizer_copy
from chimera.convert.build.proofs import proof
from chimera.convert.read.sources import changed_files
from chimera.manifest import Manifest, Rows, Split, Stream
from chimera.mds import SPLITS, digest, file_of, index_bytes
from chimera.proof_file import name_of

Found = TypeVar("Found")


def publish(plan: BuildPlan, parts: dict[str, list[PartState]], work: Path, output: Output) -> Manifest:
    """Bring everything to the output; returns the manifest, with the streams that are there already."""
    check_sources(plan)
    tokenizer = tokenizer_copy(work, plan)
    proofs = {name: proof(plan, name, work) for name in parts if not name.endswith(EVAL)}
    built = make_manifest(plan, parts, {name: digest("sha256", data) for name, data in proofs.items()})
    check_sums(built)
    check_streams(built, plan, work)
    output.check_claims()
    _publish_shards(plan, parts, work, output)
    for name in proofs:
        output.check_claims([name])  # or what another builder has there would be removed
        for key, stream in _of_stream(plan.streams, name).items():
            for index in range(len(parts[key]), len(stream.parts)):  # parts that ran ahead of `max_tokens`
                for shard in all_shard_keys(name, part_state.load(stream.part_folder(work, index))):
                    output.delete_shard(shard)
        states = _states(parts, name)
        for split in SPLITS:
            entries = [entry for state in states for entry in state.splits[split].shards]
            if entries:
                output.write(f"{name}/{split}/index.json", index_bytes(entries))
            output.remove_stale(f"{name}/{split}", [file_of(entry)["basename"] for entry in entries])
        output.put(collect_rejects(plan, name, parts, work), f"rejects/{name}.jsonl.zst")
        output.write(name_of(name), proofs[name])
    output.write("tokenizer/tokenizer.json", tokenizer)
    manifest = update_manifest(output, lambda found: merged(found, built, output))
    output.release()
    return manifest


def _of_stream(found: dict[str, Found], name: str) -> dict[str, Found]:
    """What there is of a stream, and of its own validation set."""
    return {key: found[key] for key in (name, f"{name}{EVAL}") if key in found}


def _states(parts: dict[str, list[PartState]], name: str) -> list[PartState]:
    return [state for states in _of_stream(parts, name).values() for state in states]


def _publish_shards(plan: BuildPlan, parts: dict[str, list[PartState]], work: Path, output: Output) -> None:
    """Bring the shards to the output; a part one of whose shards was there and is no more is to be made again."""
    lost: dict[Path, str] = {}
    for name, states in parts.items():
        for index, state in enumerate(states):
            folder = plan.streams[name].part_folder(work, index)
            for split in SPLITS:
                for entry, key in zip(state.splits[split].shards, shard_keys(name, split, state), strict=True):
                    if not output.publish_shard(folder / split / file_of(entry)["basename"], key, entry):
                        lost[folder] = key
    for folder in lost:
        shutil.rmtree(folder)
    if lost:
        raise UserError(
            f"{output.name}/{min(lost.values())} is missing, or damaged: run the same command again, which makes it "
            "anew"
        )


def make_manifest(plan: BuildPlan, parts: dict[str, list[PartState]], proofs: dict[str, str]) -> Manifest:
    """The manifest of the given parts, without anything that differs between two builds of the same output."""
    settings = plan.build_settings
    return Manifest(
        format=2 if any(stream.template and stream.template.eos_inside for stream in plan.streams.values()) else 1,
        block_len=settings.block_len,
        dtype=plan.dtype,
        compression=settings.compression,
        hash=settings.hash,
        tokenizer=plan.tokenizer,
        streams={
            name: Stream(
                format=settings.streams[name].format,
                packing=settings.streams[name].packing,
                source=plan.streams[name].source,
                eval_source=plan.streams[f"{name}{EVAL}"].source if f"{name}{EVAL}" in plan.streams else None,
                encoder=plan.streams[name].encoder,
                proof=proofs.get(name),
                template=plan.streams[name].template,
                max_token_id=max((part.max_token_id for part in states), default=-1),
                rows=Rows(
                    read=sum(part.read for part in states),
                    documents=sum(part.documents for part in states),
                    filtered=_sum([part.filtered for part in states]),
                    rejected=_sum([part.rejected for part in states]),
                ),
                **_counted(states),
                train=_split("train", states),
                eval=_split("eval", states),
            )
            for name, states in ((name, _states(parts, name)) for name in proofs)
        },
        settings=plan.settings,
    )


def _split(split: str, parts: list[PartState]) -> Split:
    states = [part.splits[split] for part in parts]
    entries = [entry for state in states for entry in state.shards]
    return Split(
        documents=sum(state.documents for state in states),
        tokens=sum(state.tokens for state in states),
        padding=sum(state.padding for state in states),
        blocks=sum(state.blocks for state in states),
        shards=len(entries),
        index=digest("sha256", index_bytes(entries)) if entries else None,
    )


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for count in counts for reason in count})
    return {reason: sum(count.get(reason, 0) for count in counts) for reason in reasons}


def _counted(parts: list[PartState]) -> dict[str, dict[str, int]]:
    """What the parts counted beside documents: shapes of conversations, fields passed over, what is too long."""
    kinds = sorted({kind for part in parts for kind in part.counted})
    summed = {kind: _sum([part.counted.get(kind, {}) for part in parts]) for kind in kinds}
    for names in summed.values():  # which the data may bring
        for name, count in Counter(names).most_common()[part_state.MOST_NAMES :]:
            del names[name]
            names[part_state.OTHER_NAMES] = names.get(part_state.OTHER_NAMES, 0) + count
    return summed


def check_sources(plan: BuildPlan) -> None:
    """Refuse to publish what was read of a file while it grew or shrank: rows of it are missing, or one is cut."""
    for name, stream in plan.streams.items():
        describe = stream.source.describe
        sizes = {file["path"]: file["bytes"] for file in describe.get("files", [])}
        for file in changed_files(describe):
            raise UserError(
                f"streams.{name}: the size of {file} changed while it was read, so nothing is published: cut it back "
                f"to {sizes[file]} bytes and run the same command again, or set `rebuild=true` once it is whole"
            )


def check_sums(manifest: Manifest) -> None:
    """Every row accounted for, every token in a block; a difference is a defect, and nothing is published."""
    for name, stream in manifest.streams.items():
        more = stream.turns.get("each", 0)  # documents than rows
        _equal(name, "rows", stream.rows.read + more, stream.rows.documents + stream.rows.dropped)
        _equal(name, "documents", stream.rows.documents, stream.train.documents + stream.eval.documents)
        for split, found in stream.splits.items():
            _equal(name, f"{split} tokens", found.blocks * manifest.block_len, found.tokens + found.padding)


def check_streams(manifest: Manifest, plan: BuildPlan, work: Path) -> None:
    """Refuse to publish a stream without a single document: its column or format is not that of its source."""
    for name, stream in manifest.streams.items():
        if not (stream.train if manifest.settings["streams"][name]["sources"] else stream.eval).documents:
            kept = {"set aside by `eval_fraction`": stream.eval.documents} if stream.eval.documents else {}
            found = {**kept, **stream.rows.filtered, **stream.rows.rejected}
            counts = ", ".join(f"{n} {reason}" for reason, n in found.items())
            counts += ": its files are not UTF-8, make them so (`iconv -f LATIN1 -t UTF-8`)" * ("invalid_utf8" in found)
            raise UserError(
                f"streams.{name}: no document for training in {stream.rows.read} rows ({counts or 'no row'}): fix its "
                f"`format`, `column` or `sources` and set `rebuild=true`{_rejects(plan.streams[name], work)}"
            )


def _rejects(stream: StreamPlan, work: Path) -> str:
    """Where the rejected rows of an unfinished build are to be seen, if there are any."""
    files = [stream.part_folder(work, index) / "rejects.jsonl" for index in range(len(stream.parts))]
    held = [str(file) for file in files if file.exists() and file.stat().st_size]
    more = f" and {len(held) - 1} more beside it" if len(held) > 1 else ""
    return f" (until then the rejected rows, with reasons, are in {held[0]}{more})" if held else ""


def _equal(stream: str, what: str, left: int, right: int) -> None:
    if left != right:
        raise RuntimeError(f"{stream}: the {what} do not add up: {left} against {right}: nothing was published")


def collect_rejects(plan: BuildPlan, name: str, parts: dict[str, list[PartState]], work: Path) -> Path:
    """The reject file of a stream: those of its parts in order, lines counted from the start of their file."""
    lines_before: dict[str, int] = {}  # physical lines of each file in the spans so far
    collected = work / "rejects.jsonl.zst"
    with open(collected, "wb") as out:
        # With a checksum, so that damage is noticed: the manifest holds no hash of this file.
        packed = zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(out, closefd=False)
        streams = _of_stream(plan.streams, name)
        for stream, index, state in ((streams[key], *each) for key in streams for each in enumerate(parts[key])):
            part_state.check_rejects(stream.part_folder(work, index), state)
            bases = []
            for span, lines in zip(stream.parts[index].spans, state.lines, strict=False):
                bases.append(lines_before.get(span.file, 0))
                lines_before[span.file] = bases[-1] + lines
            left = state.reject_bytes
            with open(stream.part_folder(work, index) / "rejects.jsonl", "rb") as file:
                while left > 0 and (line := file.readline()):
                    left -= len(line)
                    place, _, text = line.partition(b" ")
                    reject = json.loads(text)
                    if "line" in reject:
                        reject["line"] += bases[int(place)]
                    packed.write(json.dumps(reject).encode() + b"\n")
        packed.close()
        out.flush()
        os.fsync(out.fileno())  # under this name: the output takes it from here, whole
    return collected
