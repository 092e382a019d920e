"""The bar's sums, which are kept up to date and never added up anew."""

import random

import pytest

from chimera.convert.build.part import Progress
from chimera.convert.build.part_state import PartState
from chimera.convert.build.plan import StreamPlan
from chimera.convert.build.stream_bar import StreamBar
from chimera.convert.read.reading import Span
from chimera.convert.read.sources import Part
from chimera.convert.stream_settings import StreamSettings
from chimera.manifest import EncoderPath, Source

PARTS, SIZE, LIMIT = 12, 1000, 3000


def at(tokens: int, read: float) -> PartState:
    state = PartState(bytes=read)
    state.splits["train"].tokens = tokens
    return state


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_the_bar_is_where_its_parts_are(limit: int | None) -> None:
    settings = StreamSettings.model_validate({"max_tokens": limit, "sources": [{"files": ["lines.jsonl"]}]})
    parts = [Part((Span("file", "lines.jsonl", SIZE * i, SIZE * (i + 1), SIZE),)) for i in range(PARTS)]
    source = Source(index=0, describe={}, passed_over=[])
    plan = StreamPlan("b", "s", settings, source, "text", parts, EncoderPath(path="", reason=""))
    rng, seen = random.Random(1), []
    tokens, read = [rng.randrange(300) for _ in parts], [float(rng.randrange(SIZE)) for _ in parts]
    bar, accepted = StreamBar(plan, [at(*each) for each in zip(tokens, read, strict=True)]), 0
    for _ in range(300):
        part, more = rng.randrange(PARTS), rng.randrange(100)
        what = rng.choice(["moved", "moved", "at", "accept"])
        if what == "moved":
            bar.moved(part, Progress(more / 4, more))
            tokens[part], read[part] = tokens[part] + more, read[part] + more / 4
        elif what == "at":  # a part that is done anew goes back
            bar.at(part, at(more, more))
            tokens[part], read[part] = more, float(more)
        elif accepted < PARTS and rng.random() < 0.2:
            bar.accept()
            accepted += 1
        seen.append(min(sum(read), PARTS * SIZE) if limit is None else min(sum(tokens[: accepted + 1]), limit))
        assert bar.place() == seen[-1]
    bar.close()
    assert len(set(seen)) > 50
