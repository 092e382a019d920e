"""Row → document: the text or conversation one row holds, or why it is dropped (`read/parsing.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError
from chimera.convert.encode.chats import ChatRenderer
from chimera.convert.encode.conversations import ConversationReader, Turn
from chimera.convert.encode.document import Document, Piece
from chimera.convert.encode.texts import Reject, blank, text_of
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Wanted

if TYPE_CHECKING:
    from chimera.convert.stream_settings import StreamSettings

_SHAPES_OF_OLD = ("messages", "instruction/output")  # go without saying: a build of these alone has its old manifest


class DocumentReader:
    """Reads the rows of one stream.

    `column` is what a `text` stream's source has for text: a column, or several. `chats` renders conversations by a
    template other than ChatML. Raises `UserError` when a `chatml` stream's tokenizer lacks the ChatML special tokens.
    """

    def __init__(
        self,
        settings: "StreamSettings",
        special_ids: Mapping[str, int],
        column: Wanted = "text",
        chats: ChatRenderer | None = None,
    ) -> None:
        self.min_chars = settings.min_chars or 0
        self.columns = (column,) if isinstance(column, str) else tuple(column or ())
        self._document = self._text if settings.format == "text" else self._conversation
        self.chats, self._each = chats, settings.turns == "each"
        if settings.format != "text":
            self.conversations = ConversationReader(settings.messages, settings.roles, template=chats is not None)
        if settings.format == "chatml":
            missing = [token for token in (IM_START, IM_END) if token not in special_ids]
            if missing:
                raise UserError(
                    f"the tokenizer has no special token {' or '.join(missing)}, which `format: chatml` needs: "
                    "add it to the tokenizer, or train one with convert/train_tokenizer.py"
                )
            self.marks = special_ids[IM_START], special_ids[IM_END]

    def read(self, row: object) -> Document | Dropped:
        """The row's document, or why there is none."""
        if not isinstance(row, (dict, Mapping)):  # the first of which costs less to ask for
            return Dropped("rejected", "not_an_object")
        try:
            return self._document(row)
        except Reject as reject:
            return Dropped("rejected", str(reject))

    def _text(self, row: Mapping[str, Any]) -> Document | Dropped:
        pieces = text_of(row, self.columns)
        few = len(pieces[0]) < 4 * self.min_chars  # bytes: else there are enough characters
        if few and sum(len(piece.decode()) for piece in pieces) < self.min_chars:
            return Dropped("filtered", "too_short")
        return Document(pieces)

    def _conversation(self, row: Mapping[str, Any]) -> Document | Dropped:
        conversation = self.conversations.read(row)
        turns = _said(conversation.turns)
        answers = [turn.trained for turn in turns if turn.role == "assistant"]
        if not answers:
            return Dropped("filtered", "no_answer")
        if any(blank(turn.content) and not turn.beside for turn in turns):
            return Dropped("filtered", "empty_message")
        if not any(answers):
            return Dropped("filtered", "nothing_trained")
        counted = [("ignored", name) for name in conversation.ignored]
        if conversation.shape not in _SHAPES_OF_OLD:
            counted.append(("shapes", conversation.shape))
        counted += [("turns", "untrained")] * answers.count(False)
        documents, reasons = self._rendered(turns, conversation.tools)
        if not documents:
            return Dropped("filtered", reasons[-1])
        counted += [("turns", reason) for reason in reasons]
        first, *more = documents
        return replace(first, shape=conversation.shape, counted=tuple(counted), more=tuple(more))

    def _rendered(self, turns: list[Turn], tools: list[Any]) -> tuple[list[Document], list[str]]:
        """The documents of a conversation, and why answers of it are not learned."""
        if self.chats is None and not self._each:
            return [render(turns, *self.marks)], []
        ways = self.ways(turns)
        if self.chats is None:
            ways = [([replace(t, trained=a) for t, a in zip(some, of, strict=True)], of) for some, of in ways]
            return [render(some, *self.marks) for some, _ in ways], []
        found = [self.chats.document([message(turn) for turn in some], of, tools) for some, of in ways]
        reasons = [reason for _, why in found for reason in why]
        return [made for made, _ in found if any(made.assistant) or made.eos_learned], reasons

    def turns(self, row: Mapping[str, Any]) -> tuple[list[Turn], list[Any]]:
        """The turns of a row's conversation, and its tools. Raises `Reject`."""
        conversation = self.conversations.read(row)
        return _said(conversation.turns), conversation.tools

    def ways(self, turns: list[Turn]) -> list[tuple[list[Turn], list[bool]]]:
        """The turns of each document of a conversation, with which of them are learned."""
        learned = [turn.role == "assistant" and turn.trained for turn in turns]
        if not self._each:
            return [(turns, learned)]
        last = [index for index, each in enumerate(learned) if each]
        return [(turns[: index + 1], [False] * index + [True]) for index in last]

    @property
    def template_error(self) -> str:
        """What the template last said against a row."""
        return self.chats.renderer.error if self.chats else ""


def _said(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.role != "system" or not blank(turn.content)]


def message(turn: Turn) -> dict[str, Any]:
    """A turn as templates are given it."""
    return {"role": turn.role, "content": b"".join(turn.content).decode(), **turn.beside}


def render(turns: Sequence[Turn], start: int, end: int) -> Document:
    """ChatML: `<|im_start|>ROLE\\nCONTENT<|im_end|>` for each turn, joined with a newline.

    The assistant says its content and the closing `<|im_end|>`. Its header `ROLE\\n` is a piece of its own, as it is at
    inference, where the prompt ends with it; of other turns header and content are encoded together, as there. (So an
    answer that begins with white space may have other ids than in a prompt that has it for an earlier turn.)
    """
    pieces: list[Piece] = []
    assistant: list[bool] = []
    answers: list[int] = []
    for turn in turns:
        said = turn.role == "assistant"
        if pieces:
            pieces.append(b"\n")
            assistant.append(False)
        header = f"{turn.role}\n".encode()
        texts = (header, *turn.content) if said else (header + turn.content[0], *turn.content[1:])
        pieces += [start, *texts, end]
        assistant += [False, False, *[said and turn.trained] * len(texts)]
        if said:
            answers.append(len(pieces))
    return Document(tuple(pieces), tuple(assistant), tuple(answers))
