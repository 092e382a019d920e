"""The first documents of each stream as they will be trained, before anything is built."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from chimera.cli import UserError
from chimera.convert.build.head import encodes
from chimera.convert.build.plan import StreamPlan, encoder_for, reader_of
from chimera.convert.build.planner import plan_stream
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.too_long import Fitted, fitted
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Position
from chimera.convert.read.sources import rows
from chimera.convert.settings import BuildSettings
from chimera.text import counted, marked

MOST_ROWS = 10_000  # of a stream that are looked at
MOST_TOKENS = 2048  # of a document that are shown


def sample_size(words: Sequence[str]) -> int:
    """The N of `sample=N`."""
    given = [word.partition("=")[2] for word in words if word.startswith("sample=")]
    if len(given) != 1 or not given[0].isdecimal() or not int(given[0]):
        raise UserError(f"`sample={given[-1]}`: give it once, as a number of documents, at least 1")
    return int(given[0])


def sample(settings: BuildSettings, count: int, color: bool = False) -> Iterator[str]:
    """Lines that show the first `count` documents of each stream, what is trained on marked; nothing is written.

    Raises `UserError` for what a build refuses before it begins.
    """
    encoder = Encoder.from_settings(settings.tokenizer)
    with tempfile.TemporaryDirectory(prefix="chimera-sample-") as scratch:
        for name in settings.streams:
            stream = plan_stream("", name, settings, Path(scratch), encoder)
            mine = encoder_for(stream, encoder)
            shown = 0
            for found in _documents(stream, settings, mine, Path(scratch)):
                ids, mask, way = found
                shown += 1
                length = counted(len(ids), "token") + (f", too long: {way}" if way else "")
                yield f"── {name}, document {shown}: {length} ──"
                # The first token is predicted by none. A text is learned whole, a conversation by `train_on`.
                trained = [False, *(mask[1:] if mask is not None else [True] * (len(ids) - 1))]
                yield marked(ids[:MOST_TOKENS], trained[:MOST_TOKENS], mine.decode, color)
                if len(ids) > MOST_TOKENS:
                    yield f"[{counted(len(ids) - MOST_TOKENS, 'more token')}]"
                if shown == count:
                    break
            if not shown:
                yield f"── {name}: no document in its rows (of more than {MOST_ROWS}, the first) ──"


def _documents(stream: StreamPlan, settings: BuildSettings, encoder: Encoder, scratch: Path) -> Iterator[Fitted]:
    reader = reader_of(settings, stream, encoder)
    left = MOST_ROWS
    for span in (span for part in stream.parts for span in part.spans):
        for row in rows(span, stream.column, Position(), settings.limits(scratch)):
            if isinstance(row.value, Dropped) or row.value is None:
                continue
            document = reader.read(row.value)
            if isinstance(document, Document) and encodes(encoder, document):
                for encoded in encoder.encode_turns([document, *document.more]):
                    found = fitted(*encoded, stream.settings, settings.block_len, len(encoder.bos))
                    if not isinstance(found, str):
                        yield found
            left -= 1
            if not left:
                return
