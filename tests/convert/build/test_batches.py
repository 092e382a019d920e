"""Batches: the same shards whatever their size, and of texts what is of a split."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera.convert.build import batches
from chimera.convert.encode.assembling import Encoded, woven
from chimera.convert.encode.document import Document
from chimera.convert.read.reading import Position, Row
from tests.convert import builds


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_rows_one_by_one_and_texts_in_batches_give_the_same_shards(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    files = [{"files": [f"{sources}/plain.jsonl", f"{sources}/0.parquet"]}]
    streams: dict[str, Any] = {
        "all": {"packing": packing, "sources": files},
        "limited": {"packing": packing, "sources": files, "max_tokens": 9000, "min_tokens": 40},
    }
    for name, rows in (("one", 1), ("seven", 7), ("many", 1024)):
        monkeypatch.setattr(batches, "BATCH_ROWS", rows)
        builds.build_here(builds.config(sources, tmp_path / name, streams=streams, eval_fraction=0.3))
    one, *others = (builds.tree(tmp_path / name) for name in ("one", "seven", "many"))
    assert all(other == one for other in others)
    assert len(one) > 20


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1), st.integers(0, 3))
def test_of_texts_those_are_chosen_that_are_of_a_split(texts: list[tuple[int, bool]], left_out: int) -> None:
    lengths, which = np.array([length for length, _ in texts]), np.array([wanted for _, wanted in texts])
    ends = np.cumsum([0, *lengths])
    which = which[: max(1, len(which) - left_out)]
    ids, found = batches.chosen(Encoded(np.arange(ends[-1]), ends), which)
    wanted = [np.arange(a, b) for a, b, on in zip(ends[:-1], ends[1:], which, strict=False) if on]
    assert [ids[a:b].tolist() for a, b in pairwise(found)] == [w.tolist() for w in wanted]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1), st.integers(1, 30))
def test_a_batch_ends_with_the_text_that_reaches_the_limit(rows: list[tuple[bool, int]], limit: int) -> None:
    row = Row(None, None, 0, 0.0, Position())
    batch: list[batches.Found] = [(0, row, Document((b"a",)) if text else None) for text, _ in rows]
    lengths = [length for text, length in rows if text]
    count = batches.cut_at(limit, batch, np.array(lengths, int))
    texts = sum(found is not None for _, _, found in batch)
    if sum(lengths) < limit:
        assert (texts, len(batch)) == (len(lengths), len(rows))
        assert count > texts
    else:
        assert count == texts
        assert sum(lengths[: texts - 1]) < limit <= sum(lengths[:texts])
        assert batch[-1][2] is not None


def test_special_tokens_stand_where_they_were_between_texts() -> None:
    ids, lengths = woven([7, b"one", b"", 8, 9, b"two", 7], np.array([1, 2, 3], np.uint16), np.array([0, 2, 2, 3]))
    assert ids.tolist() == [7, 1, 2, 8, 9, 3, 7]
    assert lengths.tolist() == [1, 2, 0, 1, 1, 1, 1]
