"""The head of a stream's source, read while planning: does it hold what is asked for, and what do its rows become?"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any, Protocol

from chimera.cli import UserError, say
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Position, Wanted
from chimera.convert.read.sources import Part, rows
from chimera.convert.stream_settings import StreamSettings
from chimera.limits import Limits
from chimera.text import one_line
from chimera.tokenizer_file import gave_up

SAMPLE_DOCUMENTS = 64  # of a stream's head, on which the fast encoder must agree with the slow one
SAMPLE_BYTES = 1 << 20


class Head(Protocol):
    """A source whose first rows are read."""

    @property
    def column(self) -> Wanted: ...

    @property
    def parts(self) -> list[Part]: ...


@dataclass
class Sample:
    """What the first rows of a stream become: about `SAMPLE_BYTES` of `texts`, and the `shapes` of conversations.

    Of documents shorter than that, the `rows` and what they become are kept too.
    """

    texts: list[str] = field(default_factory=list)
    shapes: set[str] = field(default_factory=set)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    size: int = 0

    def add(self, row: Mapping[str, Any], document: Document) -> None:
        if document.shape:
            self.shapes.add(document.shape)
        if document.size < SAMPLE_BYTES:
            self.rows.append(row)
            self.documents.append(document)
        for text in (text for each in (document, *document.more) for text in each.texts):
            if self.size >= SAMPLE_BYTES:
                return
            self.texts.append(text.decode())
            self.size += len(text)

    def keep(self, wanted: Callable[[Document], bool]) -> None:
        """Leave out what is not `wanted`."""
        self.texts = [text for text in self.texts if wanted(Document((text.encode(),)))]
        kept = [wanted(document) for document in self.documents]
        self.rows, self.documents = [*compress(self.rows, kept)], [*compress(self.documents, kept)]


def sample_of(where: str, stream: StreamSettings, opened: Head, reader: DocumentReader, limits: Limits) -> Sample:
    """The sample of a stream.

    Raises `UserError` where no row there holds what the stream asks for, and warns where none is a document.
    """
    sample, read, readable, keys = Sample(), 0, 0, ""
    for value in _values(opened, limits):
        found = value if isinstance(value, Dropped) else reader.read(value)
        readable += found is not value
        if isinstance(found, Dropped):
            sample.dropped[found.reason] += 1
            if isinstance(value, Mapping):
                keys = ", ".join(map(str, list(value)[:8]))
            continue
        read += 1
        sample.add(value, found)
        if sample.size >= SAMPLE_BYTES or read == SAMPLE_DOCUMENTS:
            return sample
    dropped = sample.dropped
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if readable and sum(dropped[reason] for reason in ("missing_field", "wrong_type")) == readable:
        text = stream.format == "text"
        wanted = f"text under `{opened.column}`" if text else "a conversation"
        remedy = "`column` or `format`" if text else "`format`, or name its keys (`messages: {list, role, content}`)"
        raise UserError(
            f"{where}: none of the first {dropped.total()} rows of its source holds {wanted} ({reasons}; the last has "
            f"{keys}): correct its {remedy}"
        )
    if dropped["prompt"] and not read and reader.chats:
        raise UserError(
            f"{where}: no answer of the first {dropped.total()} rows of its source can be learned ({reasons}): the "
            f"template's prompt ends with {reader.chats.prompt[-40:]!r}, and what it renders of an answer does not go "
            "on from that: use a template of your own (`template: my.jinja`)"
        )
    if dropped and not read:
        more = f"; the template says: {reader.template_error}" if reader.template_error else ""
        if dropped["unknown_role"]:
            role = one_line(reader.conversations.unknown_role)[:80]
            more += f"; a role is {role!r}: say whose it is in `roles`, as {{{role}: user}}"
        say(f"{where}: warning: none of the first {dropped.total()} rows of its source is a document ({reasons}{more})")
    return sample


def _values(opened: Head, limits: Limits) -> Iterator[Any]:
    """What the first rows hold, blank lines left out."""
    for part in opened.parts[:1]:
        for span in part.spans:
            for row in islice(rows(span, opened.column, Position(), limits), 8 * SAMPLE_DOCUMENTS):
                if row.value is not None:
                    yield row.value


def encodes(encoder: Encoder, document: Document) -> bool:
    """Whether the tokenizer does not fail on a row's documents."""
    try:
        encoder.encode([document, *document.more])
    except BaseException as error:
        if not gave_up(error):
            raise
        return False
    return True
