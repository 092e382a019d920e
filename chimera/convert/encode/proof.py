"""The proof that what is stored is what is served: a stream's sample against `apply_chat_template`.

For each conversation of the sample the ids of the rendering equal those that the tokenizer of its user gives, and what
is stored before its first answer equals the prompt that a server makes. A conversation whose contents look like control
tokens has no such equal (a server makes control tokens of them), and is left out.

Later prompts: a server tokenizes the history whole, while what is stored was cut where each earlier answer began. Where
that gives other ids (an answer that begins with white space), it is counted and said: neither can be changed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from chimera.cli import UserError
from chimera.convert.encode.chats import ChatRenderer
from chimera.convert.encode.document import Document, Piece
from chimera.convert.encode.documents import DocumentReader, message
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.template import loaded_tokenizer
from chimera.text import counted, one_line

if TYPE_CHECKING:
    from chimera.convert.settings import TokenizerSettings

Ids = list[int]


class Pair(NamedTuple):
    """Pieces as they are stored, and the ids of a server. `later`: of a prompt with learned answers in it."""

    pieces: Sequence[Piece]
    served: Ids
    later: bool


def prove_sample(
    where: str,
    rows: Sequence[Any],
    documents: Sequence[Document],
    reader: DocumentReader,
    encoder: Encoder,
    tokenizer: "TokenizerSettings",
) -> str:
    """Prove a sample, of rows and what they become, and say so. Raises `UserError` where ids first differ."""
    found: Counter[str] = Counter()
    loaded = loaded_tokenizer(tokenizer) if reader.chats and rows else None
    for row, document in zip(rows, documents, strict=True):
        if reader.chats is None:
            pairs = [*_of_chatml((document, *document.more), encoder)]
        else:
            pairs = [*_of_template(row, reader, reader.chats, loaded)]
        found["proven" if pairs else "like control tokens"] += 1
        for pair in pairs:
            pieces = tuple(pair.pieces)
            ours = encoder.encode([Document(pieces, (False,) * len(pieces))])[0][0][:-1].tolist()
            if ours != pair.served:
                if not pair.later:
                    raise UserError(f"{where}: {_difference(ours, pair.served, encoder, sum(found.values()))}")
                found["later"] += 1
    if not found["proven"]:
        return "no conversation of the sample to compare with apply_chat_template"
    left = (
        f" ({found['like control tokens']} more hold text like control tokens)" if found["like control tokens"] else ""
    )
    later = ""
    if found["later"]:
        later = (
            f"; before {counted(found['later'], 'later answer')} a server, which encodes what was said as one text, "
        )
        later += "has other ids than the shards, which encode each answer as the model wrote it"
    return f"ids equal apply_chat_template's in {counted(found['proven'], 'conversation')} of a sample{left}{later}"


def _of_template(row: Any, reader: DocumentReader, chats: ChatRenderer, loaded: Any) -> Iterator[Pair]:
    turns, tools = reader.turns(row)
    for some, learned in reader.ways(turns):
        messages = [message(turn) for turn in some]
        whole = chats.rendered(messages, tools)
        if whole.like_control:
            continue
        texts = chats.renderer.template.texts
        text = texts["tool_use" if tools and "tool_use" in texts else "default"]
        chats.renderer.compiled(tools)  # on its day

        def served(messages: Sequence[Any], prompt: bool, text: str = text) -> Ids:
            options = {"add_generation_prompt": prompt, "tokenize": True, "return_dict": False}
            return list(loaded.apply_chat_template(messages, tools or None, chat_template=text, **options))

        yield Pair(
            [piece for _, piece in chats.control.segments(whole.text, whole.found, ())], served(messages, False), False
        )
        answers, _ = chats.answers(messages, learned, tools, whole)
        segments = list(chats.control.segments(whole.text, whole.found, [answer.begin for answer in answers.values()]))
        for number, (index, answer) in enumerate(answers.items()):
            if not index:
                continue  # no server is asked for the first message
            before = [piece for start, piece in segments if start < answer.begin]
            yield Pair(before, served(messages[:index], True), number > 0)


def _of_chatml(documents: Sequence[Document], encoder: Encoder) -> Iterator[Pair]:
    """A server's ids are those of `tokenizers`, which `apply_chat_template` hands the rendering to."""
    names = {id_: token for token, id_ in encoder.special_ids.items()}
    control = encoder.control_tokens()
    for document in documents:
        text = document.text_with(names)
        if len(control.find(text)) > len(document.pieces) - len(document.texts):
            continue
        yield Pair(_whole(document.pieces), encoder.encode_served(text), False)
        begins = [
            n for n, (a, b) in enumerate(zip((False, *document.assistant), document.assistant, strict=False)) if b > a
        ]
        for number, begin in enumerate(begins):
            before = document.pieces[:begin]
            yield Pair(before, encoder.encode_served(Document(before).text_with(names)), number > 0)


def _whole(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with neighboring texts as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and isinstance(piece, bytes) and isinstance(before := found[-1], bytes):
            found[-1] = before + piece
        else:
            found.append(piece)
    return found


def _difference(ours: Ids, theirs: Ids, encoder: Encoder, row: int) -> str:
    """Where two lists of ids first differ, with what is there."""
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    places = ours[max(0, same - 8) : same], ours[same:][:6], theirs[same:][:6]
    before, held, given = (f"{ids} ({one_line(repr(encoder.decode(ids)))})" for ids in places)
    return (
        f"conversation {row} of its sample: from token {same} on, behind {before}, the shards would hold {held} and "
        f"apply_chat_template gives {given}, so that another text would be served than was trained: correct the "
        "tokenizer's folder (its `lstrip`, `rstrip` and `normalized` tokens first), or use another"
    )
