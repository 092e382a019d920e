"""A plan made: each stream's source opened, its head read, its encoder proven on a sample."""

import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from chimera.cli import say
from chimera.convert.build.head import encodes, sample_of
from chimera.convert.build.held_out import write_digests
from chimera.convert.build.part_state import EVAL
from chimera.convert.build.plan import (
    BuildPlan,
    StreamPlan,
    encoder_for,
    held_out_file,
    planned_settings,
    reader_of,
    sample_file,
    text_bos,
)
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.probe import probed
from chimera.convert.encode.proof import prove_sample
from chimera.convert.encode.proof_lines import proof_of
from chimera.convert.read.sources import open_source
from chimera.convert.settings import BuildSettings, identity, running_settings
from chimera.files import write_whole
from chimera.manifest import ChatTemplate, EncoderPath, Source, Tokenizer
from chimera.mds import digest
from chimera.tokenizer_file import gave_up


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
    held_out = None
    if name.endswith(EVAL):
        file = held_out_file(work, name.removesuffix(EVAL))
        held_out = write_digests(file, opened.parts, opened.column, reader, settings.limits(work))

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
    path = EncoderPath(path=mine.path, reason=mine.reason)
    return replace(plan, encoder=path, proof=digest("sha256", proof), held_out=held_out)
