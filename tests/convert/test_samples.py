"""The bundled sample is what its generator makes, small, and of two languages."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from samples import make_samples
from samples.make_samples import BAD_LINES, samples

FOLDER = Path(make_samples.__file__).parent


def stored(name: str) -> list[str | None]:
    path = FOLDER / name
    if path.suffix == ".jsonl":
        return list(path.read_text(encoding="utf-8").split("\n")[:-1])
    return list(pq.read_table(path)["text"].to_pylist())


@pytest.mark.parametrize("name", samples())
def test_the_bundled_rows_are_the_generators(name: str) -> None:
    assert stored(name) == samples()[name]


def test_the_files_are_small() -> None:
    sizes = [(FOLDER / name).stat().st_size for name in samples()]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 2_000_000


def test_texts_do_not_repeat_and_the_languages_differ() -> None:
    words = {}
    for name in ("en_lessons.parquet", "it_pages.parquet"):
        texts = [text for text in stored(name) if text]
        assert len(set(texts)) == len(texts)
        words[name] = Counter(word for text in texts for word in text.lower().split())
    english, italian = ({word for word, _ in count.most_common(100)} for count in words.values())
    assert len(english & italian) < 10


def test_the_answers_to_sums_are_right() -> None:
    """Every `A + B = C` (and -, x, :) that the sample states is true."""
    operations = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, ":": int.__floordiv__}
    checked = 0
    for row in [*stored("en_lessons.parquet"), *stored("it_pairs.jsonl")]:
        words = (row or "").replace(".", " ").replace('"', " ").split()
        for a, sign, b, equals, c in zip(words, words[1:], words[2:], words[3:], words[4:], strict=False):
            if sign in operations and equals == "=":
                assert operations[sign](int(a), int(b)) == int(c)
                checked += 1
    assert checked > 500


def test_pairs_are_objects_but_for_the_bad_lines() -> None:
    lines = [line for line in stored("it_pairs.jsonl") if line not in BAD_LINES]
    assert len(lines) == 1500
    for line in lines:
        row = json.loads(line or "")
        assert set(row) == {"instruction", "input", "output"}
        assert row["instruction"]
        assert row["output"]
