"""The sample that is kept beside each stream's shards: made while planning, or when the build is published."""

from functools import partial
from pathlib import Path

from chimera.convert.build.head import encodes, sample_of
from chimera.convert.build.plan import BuildPlan, encoder_of, reader_of, sample_file
from chimera.convert.encode.proof_lines import proof_of
from chimera.mds import digest


def proof(plan: BuildPlan, stream: str, work: Path) -> bytes:
    """The proof of a stream.

    It is made again where what was read while planning counts no more or is damaged, or where an older version planned
    the build.
    """
    file = sample_file(work, stream)
    if file.exists():
        data = file.read_bytes()
        if plan.streams[stream].proof in (None, digest("sha256", data)):
            return data
    settings, planned, encoder = plan.build_settings, plan.streams[stream], encoder_of(work, plan, stream)
    reader = reader_of(settings, planned, encoder)
    sample = sample_of(f"streams.{stream}", planned.settings, planned, reader, settings.limits(work))
    sample.keep(partial(encodes, encoder))
    return proof_of(sample.rows, sample.documents, reader, encoder)
