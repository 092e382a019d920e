"""The lines of a stream's proof file (`proof_file.py`): made of its sample, and made again to verify them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chimera.convert.encode.conversations import Turn
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader, message, render
from chimera.convert.encode.encoding import Encoder
from chimera.mds import Json
from chimera.proof_file import pack

MOST_BYTES = 1 << 16  # of text in a line: what is longer is not kept


def proof_of(
    rows: Sequence[Mapping[str, Any]], documents: Sequence[Document], reader: DocumentReader, encoder: Encoder
) -> bytes:
    """The file of a sample: of rows, and what they become."""
    kept = [pair for pair in zip(rows, documents, strict=True) if pair[1].size <= MOST_BYTES]
    given = [each for row, document in kept for each in _given(row, document, reader)]
    return pack({**each, **stored(each, reader, encoder)} for each in given)


def _given(row: Mapping[str, Any], document: Document, reader: DocumentReader) -> Iterator[Json]:
    """What a row gives to each of its documents."""
    if not document.assistant:
        yield {"text": b"".join(document.texts).decode()}
        return
    turns, tools = reader.turns(row)
    for some, learned in reader.ways(turns):
        yield {"messages": [message(turn) for turn in some], "learned": learned, "tools": tools}


def stored(given: Json, reader: DocumentReader, encoder: Encoder) -> Json:
    """A line's text, ids and mask, made anew from its messages or text. Raises `Reject`."""
    if "messages" not in given:
        return {"ids": _encoded(Document((given["text"].encode(),)), encoder)[0]}
    messages, learned = given["messages"], given["learned"]
    if reader.chats is None:
        turns = [Turn(m["role"], (m["content"].encode(),), said) for m, said in zip(messages, learned, strict=True)]
        document = render(turns, *reader.marks)
        text = document.text_with({id_: token for token, id_ in encoder.special_ids.items()})
        found = len(encoder.control_tokens().find(text))
        first, served = learned.index(True), found == len(document.pieces) - len(document.texts)
    else:
        whole = reader.chats.rendered(messages, given["tools"])
        answers, _ = reader.chats.answers(messages, learned, given["tools"], whole)
        document = reader.chats.document(messages, learned, given["tools"])[0]
        first, text, served = min(answers, default=None), whole.text, not whole.like_control
    ids, mask = _encoded(document, encoder)
    return {"text": text, "ids": ids, "mask": mask, "first": first, "served": served}


def _encoded(document: Document, encoder: Encoder) -> tuple[list[int], list[int]]:
    ((ids, mask),) = encoder.encode([document])
    if mask is None:
        return ids.tolist(), []
    learned = mask.astype(int)
    learned[0] &= not document.starts  # the first of a document, which none is learned for
    return ids.tolist(), learned.tolist()
