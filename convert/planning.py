"""The plan of a build: which source each stream reads, its parts and its encoder path, decided once.

The plan lies in the work folder until the build is published, so a rerun goes on with the same source at the same
revision, and a rerun with other settings, another tokenizer or changed files is refused with the difference.
"""

import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from chimera.cli import UserError, say
from convert.documents import Document, DocumentReader, Dropped
from convert.encoding import Encoder, tokenizer_file
from convert.journal import all_shard_keys, load
from convert.outputs import Output
from convert.planned import PARTS
from convert.reading import Position
from convert.settings import BuildSettings, StreamSettings, differences, identity, stream_name
from convert.shards import Json, write_file
from convert.sources import Opened, added_files, changed_files, gone_files, open_source, rows

SAMPLE_DOCUMENTS = 64  # of a stream's head, on which the fast encoder must agree with the slow one
SAMPLE_BYTES = 1 << 20


def current_plan(settings: BuildSettings, work: Path, output: Output, digest: str) -> Json:
    """The plan of the unfinished build in `work`, or a new one.

    Raises `UserError` when the output or the unfinished build has other settings, another tokenizer (`digest`) or
    other files, unless `rebuild` is set: then `cleared` removes what is there.
    """
    plan = _unfinished(work)
    built = manifest_of(output)  # another build's: with its own this one would be finished
    if plan is not None:
        found = changes(plan, settings, digest)
        if found and not settings.rebuild:
            raise UserError(refusal(f"the unfinished build in {work}", found))
        if settings.rebuild:  # without it they are waited for, where they are not read yet
            found += [file for stream in plan["streams"].values() for file in gone_files(stream["source"]["describe"])]
        if not found and built is None:
            say(f"going on with the unfinished build in {work}")
            if plan["running"] != (running := asdict(settings)):  # how it runs may change at any time
                plan["running"] = running
                write_file(work / "plan.json", plan_bytes(plan))
            return plan
    older = {name for old in (plan, built) if old for name in (*old["streams"], *old.get("clearing", ()))}
    new = make_plan(settings, work)  # first: nothing is removed for sources that do not open
    new["clearing"] = sorted(older | settings.streams.keys())
    output.check_free(new["clearing"], settings.rebuild)
    write_file(work / "tokenizer.json", tokenizer_file(settings.tokenizer.path).read_bytes())
    write_file(work / "plan.json", plan_bytes(new))
    return new


def _unfinished(work: Path) -> Json | None:
    """The plan of an unfinished build, if there is one."""
    if not (work / "plan.json").exists():
        return None
    plan = parsed((work / "plan.json").read_bytes(), work)
    if not isinstance(plan, dict) or not {"id", "settings", "running", "tokenizer", "streams"} <= plan.keys():
        raise UserError(f"{work}/plan.json is damaged: remove {work} and build again")
    return plan


def cleared(plan: Json, work: Path, output: Output) -> Json:
    """The plan once what it replaces is removed. Until then it names those streams, for a rerun."""
    if "clearing" not in plan:
        return plan
    output.clear(plan["clearing"])
    for parts in work.glob(f"{PARTS}*"):
        for state in parts.glob("*/*/state.npz") if output.can_discard else ():
            for key in all_shard_keys(state.parents[1].name, load(state.parent)[0]):
                output.discard(key)
        shutil.rmtree(parts)
    plan = {key: value for key, value in plan.items() if key != "clearing"}
    write_file(work / "plan.json", plan_bytes(plan))
    return plan


def finished(settings: BuildSettings, output: Output, digest: str) -> bool:
    """Whether the output is this build, whole. Raises `UserError` with the difference when it is another one."""
    manifest = manifest_of(output)
    if manifest is None:
        return False
    found = changes(manifest, settings, digest)
    if found and not settings.rebuild:
        raise UserError(refusal(settings.output, found))
    if not found:
        say(f"{settings.output} is finished: nothing to do")
    return not found


def refusal(what: str, found: list[str]) -> str:
    """The sentence for an output that was built otherwise."""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return (
        f"{what} was made otherwise ({'; '.join(found[:5])}{more}): choose another `output`, take the change back, or "
        "set `rebuild=true` to replace it"
    )


def manifest_of(output: Output) -> Json | None:
    """The output's manifest, or `None` before it is whole. Raises `UserError` for one of another program."""
    data = output.read("manifest.json")
    if data is None:
        return None
    manifest = parsed(data, output.name)
    try:
        ours = manifest["format"] == 1 and manifest["settings"] and manifest["tokenizer"]["digest"]
        ours = ours and all(map(stream_name, manifest["streams"]))  # their folders are removed under `rebuild`
        ours = ours and all(stream["source"]["describe"] for stream in manifest["streams"].values())
    except (KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{output.name}/manifest.json is not of this version's builder: choose another `output`")
    return manifest


def parsed(data: bytes, where: object) -> Json:
    """A JSON file of ours."""
    try:
        value: Json = json.loads(data)
    except ValueError as error:
        raise UserError(f"a file of {where} is damaged ({error}): remove it to start anew") from None
    return value


def changes(old: Json, settings: BuildSettings, digest: str) -> list[str]:
    """How settings, tokenizer (its digest) and local files differ from those of `old`, a plan or a manifest."""
    found = differences(old["settings"], identity(settings))
    if old["tokenizer"]["digest"] != digest:
        found.append(f"tokenizer: {old['tokenizer']['digest'][:12]} -> {digest[:12]}")
    for name, stream in old["streams"].items():
        source = stream["source"]
        found += [f"the size of {file}" for file in changed_files(source["describe"])]
        now = settings.streams[name].sources[source["index"]] if not found else None
        found += [
            f"streams.{name} has {file} now" for file in (added_files(source["describe"], now, settings) if now else ())
        ]
    return found


def make_plan(settings: BuildSettings, work: Path) -> Json:
    """What every stream reads and how, from opening its source. Raises `UserError` where one does not open."""
    encoder = Encoder.from_settings(settings.tokenizer)
    return {
        "id": secrets.token_hex(8),
        "settings": identity(settings),
        "running": asdict(settings),
        "tokenizer": describe_tokenizer(settings, encoder),
        "streams": {name: _plan_stream(name, settings, work) for name in settings.streams},
    }


def plan_bytes(plan: Json) -> bytes:
    return json.dumps(plan, sort_keys=True).encode()


def _plan_stream(name: str, settings: BuildSettings, work: Path) -> Json:
    stream = settings.streams[name]
    opened = open_source(name, stream, settings)
    encoder = Encoder.from_settings(settings.tokenizer)
    if stream.format == "chatml":
        encoder.check_chat(f"streams.{name}")
    encoder.verify_sample(list(_sample(f"streams.{name}", stream, opened, encoder, settings.retries, work)))
    say(f"{name}: encoder {encoder.path} ({encoder.reason})")
    return {
        "source": {"index": opened.index, "describe": opened.describe, "passed_over": opened.passed_over},
        "column": opened.column,
        "parts": [[asdict(span) for span in part.spans] for part in opened.parts],
        "encoder": {"path": encoder.path, "reason": encoder.reason},
    }


def _sample(
    where: str, stream: StreamSettings, opened: Opened, encoder: Encoder, retries: int, work: Path
) -> Iterator[str]:
    """Texts from the head of a source.

    Raises `UserError` where no row there holds what the stream asks for, and warns where none is a document.
    """
    reader = DocumentReader(stream, encoder.special_ids, opened.column or "")
    read = (
        row.value
        for part in opened.parts[:1]
        for span in part.spans
        for row in islice(rows(span, opened.column, Position(), retries, work), 8 * SAMPLE_DOCUMENTS)
        if row.value is not None
    )
    dropped: Counter[str] = Counter()
    texts = size = readable = 0
    keys = ""
    for value in read:
        found = value if isinstance(value, Dropped) else reader.read(value)
        readable += found is not value
        if isinstance(found, Dropped):
            dropped[found.reason] += 1
            if isinstance(value, Mapping):
                keys = ", ".join(map(str, list(value)[:8]))
        if isinstance(found, Document):
            texts += 1
            for text in found.texts:
                yield text.decode()
                size += len(text)
                if size >= SAMPLE_BYTES:
                    return
            if texts == SAMPLE_DOCUMENTS:
                return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if readable and sum(dropped[reason] for reason in ("missing_field", "wrong_type")) == readable:
        wanted = "a conversation" if stream.format == "chatml" else f"text under `{opened.column}`"
        raise UserError(
            f"{where}: none of the first {dropped.total()} rows of its source holds {wanted} ({reasons}; the last has "
            f"{keys}): correct its `column` or `format`"
        )
    if dropped and not texts:
        say(f"{where}: warning: none of the first {dropped.total()} rows of its source is a document ({reasons})")


def describe_tokenizer(settings: BuildSettings, encoder: Encoder) -> Json:
    """The manifest's `tokenizer` object."""
    return {
        "digest": encoder.digest,
        "vocab_size": encoder.vocab_size,
        "eos_token": settings.tokenizer.eos_token,
        "eos_id": encoder.eos_id,
        "pad_token": settings.tokenizer.pad_token,
        "pad_id": encoder.pad_id,
        "dtype": np.dtype(encoder.dtype).name,
    }
