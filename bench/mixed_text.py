"""Text that does not repeat: sentences of real documents mixed anew, one in twenty with a word that is made up.

Encoders keep what they once encoded, so a text repeated until it is large enough would flatter them. Here sentences
come again, documents do not; their lengths are those of the real ones.
"""

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MADE_UP = 0.05  # of the sentences
LETTERS = list("abcdefghilmnopqrstuvz")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class Mixed:
    """Documents of sentences of the parquet files at `patterns`, which have a column `text`."""

    def __init__(self, patterns: list[str], seed: int = 1) -> None:
        import pyarrow.parquet as pq

        files = sorted(file for pattern in patterns for file in glob.glob(pattern))
        texts = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist() if text]
        found = dict.fromkeys(sentence for text in texts for sentence in _SENTENCE.split(text))
        self.sentences = [sentence for sentence in found if 20 <= len(sentence) <= 1000]
        self._lengths = np.array([len(text) for text in texts if len(text) >= 50])
        self._mean = max(1, sum(map(len, self.sentences)) // len(self.sentences))
        self._rng = np.random.default_rng(seed)

    def documents(self, size: int, longest: int = 1 << 30) -> Iterator[str]:
        """Documents of at least `size` bytes of UTF-8 together."""
        while size > 0:
            text = self.document(min(longest, int(self._rng.choice(self._lengths))))
            size -= len(text.encode())
            yield text

    def document(self, length: int) -> str:
        """Sentences of about `length` characters together."""
        chosen = self._rng.integers(len(self.sentences), size=max(1, round(length / self._mean))).tolist()
        said = [self.sentences[index] for index in chosen]
        for at in np.flatnonzero(self._rng.random(len(said)) < MADE_UP).tolist():
            words = said[at].split(" ")
            made_up = self._rng.choice(LETTERS, size=int(self._rng.integers(3, 12)))
            words[int(self._rng.integers(len(words)))] = "".join(made_up)
            said[at] = " ".join(words)
        return ("\n" if self._rng.random() < 0.3 else " ").join(said)


def write_parquet(texts: Iterator[str], folder: Path, count: int) -> tuple[list[str], int]:
    """`count` parquet files of a thousand rows a row group; their paths, and the bytes of all texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = list(texts)
    files = [str(folder / f"text{number}.parquet") for number in range(count)]
    for number, file in enumerate(files):
        share = every[len(every) * number // count : len(every) * (number + 1) // count]
        pq.write_table(pa.table({"text": pa.array(share, pa.string())}), file, row_group_size=1000, compression="zstd")
    return files, sum(len(text.encode()) for text in every)


def write_texts(texts: Iterator[str], folder: Path) -> int:
    """A `.txt` file for each; the bytes of all."""
    folder.mkdir()
    size = 0
    for number, text in enumerate(texts):
        size += (folder / f"{number:06d}.txt").write_bytes(text.encode())
    return size


def write_chats(mixed: Mixed, size: int, file: Path) -> int:
    """Conversations of one to eight messages of a hundred characters or a thousand, as JSONL; the bytes of the file."""
    written, number = 0, 0
    with open(file, "wb") as out:
        while written < size:
            number += 1
            roles = ("user", "assistant") * (1 + number % 4)
            messages = [{"role": role, "content": mixed.document(1000 if number % 5 == 0 else 100)} for role in roles]
            written += out.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
    return written
