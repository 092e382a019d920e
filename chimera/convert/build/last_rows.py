"""Which rows a worker is encoding, so that a crash of its process can be traced to them."""

from pathlib import Path

from chimera.convert.build.batches import Found
from chimera.convert.read.sources import Part

WHERE = "where"  # of a part's folder


class LastRows:
    """The file that says which rows of a part are encoded next."""

    def __init__(self, folder: Path, part: Part) -> None:
        self._part, self._longest = part, 0
        self._file = open(folder / WHERE, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)

    def begin(self, batch: list[Found]) -> None:
        """Say that a batch begins, over what the file said: to make it shorter would cost a wait for the disk."""
        (span, first, _), (_, last, _) = batch[0], batch[-1]
        here = self._part.spans[span]
        begin = f", counted from its byte {here.begin}" if here.begin and first.unit == "line" else ""
        words = f"{first.unit} {first.number} of {first.file or here.file} to {last.unit} {last.number}{begin}"
        self._file.seek(0)
        self._longest = self._file.write(words.encode("utf-8", "replace").ljust(self._longest))

    def remove(self) -> None:
        """The part is done."""
        Path(self._file.name).unlink()

    def __enter__(self) -> "LastRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def begun(folder: Path) -> str:
    """The rows that a part encoded last, or was about to when its process died."""
    try:
        return (folder / WHERE).read_text(encoding="utf-8").strip() or "its first rows"
    except OSError:
        return "its first rows"
