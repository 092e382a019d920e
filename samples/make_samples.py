"""Write the sample sources of the demo: the same rows every time, from a fixed seed.

    python samples/make_samples.py [FOLDER]

`en_lessons.parquet` and `it_pages.parquet` hold a `text` column, `it_pairs.jsonl` instructions and answers. A few
rows of each are of the kinds a builder meets in the wild, so that the demo's accounting has something to show.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.cli import run, say
from chimera.text import size
from samples import english, italian

SEED = 20_240_501

ENGLISH_MESS = [
    "Too short to keep.",
    None,  # no text at all
    "A page about chat formats: <|im_start|>user and <|endoftext|> are only characters here, not special tokens.",
    "A line with a NUL character \0 in its middle, as broken exports sometimes have it; it is set aside.",
]
ITALIAN_MESS = ["Pagina vuota.", None, "    \n\n  ", "Torna su"]
BAD_LINES = [
    '{"instruction": "Questa riga si interrompe',
    '{"instruction": "Manca la risposta.", "input": ""}',
    '{"instruction": "La risposta non è un testo.", "input": "", "output": 42}',
    '["una lista", "non un oggetto"]',
    '{"instruction": "Mezzo carattere: \\ud83d", "input": "", "output": "Rifiutata."}',
    "",
    '{"instruction": "E la risposta?", "input": "", "output": "  "}',
]


def texts(make: Callable[[Random], str], rows: int, mess: Sequence[str | None], seed: int) -> list[str | None]:
    """`rows` documents with the messy ones spread among them."""
    random = Random(seed)
    return _spread([make(random) for _ in range(rows)], mess)


def lines(rows: int, seed: int) -> list[str]:
    """The lines of the JSONL file, the bad ones spread among them."""
    random = Random(seed)
    return _spread([json.dumps(italian.pair(random), ensure_ascii=False) for _ in range(rows)], BAD_LINES)


def samples() -> dict[str, list[Any]]:
    """File name → rows (parquet: texts, JSONL: lines)."""
    return {
        "en_lessons.parquet": texts(english.lesson, 1200, ENGLISH_MESS, SEED),
        "it_pages.parquet": texts(italian.page, 1100, ITALIAN_MESS, SEED + 1),
        "it_pairs.jsonl": lines(1500, SEED + 2),
    }


def _spread(rows: list[Any], others: Sequence[Any]) -> list[Any]:
    """`rows` with the `others` put in at even distances."""
    every = len(rows) // (len(others) + 1)
    for i, other in enumerate(others, 1):
        rows.insert(i * every, other)
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make_samples.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="where to write")
    folder: Path = parser.parse_args(argv).folder
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in samples().items():
        path = folder / name
        if path.suffix == ".jsonl":
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        else:
            table = pa.table({"text": pa.array(rows, pa.string())})
            pq.write_table(table, path, compression="zstd", row_group_size=300)
        say(f"{path}: {len(rows)} rows, {size(path.stat().st_size)}")
    return 0


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
