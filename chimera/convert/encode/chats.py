"""Conversation → documents by a chat template: what is stored, and which tokens of it are learned.

The ids are those of the rendering, cut at the control tokens that the template writes and where generation begins.
An answer is learned from where its prompt ends to the token that ends the turn, if it reads in the whole text as it
does when it is last. Else it is seen, and counted by why it is not learned:

- `prompt`: what the template renders of it does not begin with the prompt that the model gets for it;
- `rewritten`: the template shows it otherwise once turns follow (Qwen 3 drops its reasoning);
- `no_end`: no control token ends it;
- `generation`: the template has `{% generation %}` blocks, which mark what a model says, and none of it stands in one.
  (They say no more than that: many take in a header, or leave the end of the turn out.)

A row is rejected if the template refuses it (`template_error`), leaves out a text of it (`lost:ROLE`; of an answer that
is to be learned its beginning, too) or a field (`unused_field:NAME`), reads a broken control token otherwise
(`control_token`), or writes the pad token (`pad_inside`), or EOS where it could not be told from the end of a document
(`eos_inside`): at all, of a template that does not end turns with it; else twice in a row, or before a learned token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chimera.convert.encode.control import RESERVED, SEEN, ControlTokens, Found, GoesOn, found_in
from chimera.convert.encode.document import Document
from chimera.convert.encode.template import Message, Renderer
from chimera.convert.encode.texts import Reject, chunks
from chimera.convert.read.parsing import CHUNK

REASONING = ("reasoning_content", "thinking")  # one text, under both names that templates know
BEGINNING = 48  # characters of an answer that must be there as it is rendered


@dataclass(frozen=True)
class Rendered:
    """A conversation's text with the control tokens in it; `like_control`: contents hold some too."""

    text: str
    found: list[Found]
    like_control: bool


@dataclass(frozen=True)
class Answer:
    """Where generation begins for an answer, and the end of what is learned of it."""

    begin: int
    end: int


class ChatRenderer:
    """Makes documents of the conversations of one stream."""

    def __init__(self, renderer: Renderer, control: ControlTokens, eos: str, pad: str | None) -> None:
        self.renderer, self.control, self._eos, self._pad = renderer, control, eos, pad
        self.turn_end = renderer.template.turn_end
        self.prompt = ""  # the last with which what is rendered of an answer does not begin

    def document(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: Sequence[Any] | None
    ) -> tuple[Document, list[str]]:
        """The conversation as one document, and why some answers are not learned; `trained`: which should be.

        Raises `Reject`.
        """
        whole = self.rendered(messages, tools)
        answers, reasons = self.answers(messages, trained, tools, whole)
        return self._assembled(whole, list(answers.values())), reasons

    def answers(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: Sequence[Any] | None, whole: Rendered
    ) -> tuple[dict[int, Answer], list[str]]:
        """The answers that are learned, by their message's place, and why others are not."""
        answers: dict[int, Answer] = {}
        reasons = []
        generated = self.renderer.generated(messages, tools)
        for index in (index for index, learned in enumerate(trained) if learned):
            found = self._answer(messages, tools, index, whole)
            if isinstance(found, str):
                reasons.append(found)
            elif generated is not None and not any(a < found.end and b > found.begin for a, b in generated):
                reasons.append("generation")
            else:
                answers[index] = found
        return answers, reasons

    def rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Rendered:
        """The rendering, proven to hold every text and no control token of theirs. Raises `Reject`."""
        text = self.renderer.render(messages, tools)
        if RESERVED.search(text):
            raise Reject("noncharacter")
        broken = [self._broken(message) for message in messages]
        broken_tools = self.control.break_value(tools) if tools else tools
        breaks = any(a != b for a, b in zip(broken, messages, strict=True)) or broken_tools != tools
        seen = [_seen(message) for message in broken]
        seen_tools = [_seen_call(tool) for tool in broken_tools] if broken_tools else None
        wanted = sum(_marks(message) for message in seen) + _marks(seen_tools)
        marked = self.renderer.render_or_none(seen, seen_tools)
        if marked is None or RESERVED.sub("", marked) != text or marked.count(SEEN) != wanted:
            marked = self.renderer.render_or_none(broken, broken_tools) if breaks else text
            if marked is None or RESERVED.sub("", marked) != text:
                raise Reject("control_token")
            self._check_all_seen(text, messages, tools)
        _, found = found_in(marked, self.control.find(marked))
        return Rendered(text, found, breaks and self.control.find(text) != found)

    def _answer(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, index: int, whole: Rendered
    ) -> Answer | str:
        """An answer's place in the whole, or why it is not learned."""
        prompt = self.renderer.render(messages[:index], tools, prompt=True)
        last = index == len(messages) - 1
        alone = whole.text if last else self.renderer.render(messages[: index + 1], tools)
        if not alone.startswith(prompt):
            self.prompt = prompt
            return "prompt"
        if not _begins_as(alone[max(0, len(prompt) - BEGINNING) :], messages[index].get("content")):
            raise Reject("lost:assistant")
        if any(key in messages[index] for key in REASONING) and self._without(messages, tools, index) == alone:
            raise Reject("unused_field:reasoning_content")
        same = len(alone) if last else _common(alone, whole.text)
        within = [one for one in whole.found if one.start >= len(prompt) and one.end <= same]
        ends = [one for one in within if one.token == self.turn_end] or within
        if ends and self._is_end(alone[ends[-1].end :]):
            return Answer(len(prompt), ends[-1].end)
        closed = any(alone.rstrip().endswith(token) for token in self.control.tokens)
        return "rewritten" if closed and same < len(alone) else "no_end"

    def _is_end(self, rest: str) -> bool:
        """Whether behind an answer's end there are only white space and control tokens that end no turn."""
        found = self.control.find(rest)
        for one in reversed(found):
            rest = rest[: one.start] + rest[one.end :]
        return not rest.strip() and all(one.token != self.turn_end for one in found)

    def _assembled(self, whole: Rendered, answers: Sequence[Answer]) -> Document:
        """The document of a rendering."""
        text, found, ended = self._before_eos(whole)
        pieces: list[bytes | int] = []
        learned: list[bool] = []
        ends: list[int] = []
        waiting = list(answers)
        for start, piece in self.control.segments(text, found, [answer.begin for answer in answers]):
            while waiting and start >= waiting[0].end:
                waiting.pop(0)
                ends.append(len(pieces))
            said = bool(waiting) and start >= waiting[0].begin
            parts = (piece,) if isinstance(piece, int) else _in_chunks(piece)
            pieces += parts
            learned += [said] * len(parts)
        ends += [len(pieces)] * bool(waiting)
        starts = self.renderer.template.eos_inside
        eos = self.control.tokens[self._eos].id
        if starts and any(
            a == eos and (b == eos or said)
            for a, b, said in zip(pieces, [*pieces[1:], eos], [*learned[1:], False], strict=True)
        ):
            raise Reject("eos_inside")
        eos_learned = ended and bool(answers) and answers[-1].end > len(text)
        return Document(tuple(pieces), tuple(learned), tuple(ends), eos_learned=eos_learned, starts=starts)

    def _before_eos(self, whole: Rendered) -> tuple[str, list[Found], bool]:
        """The rendering up to the EOS that ends it, if one does: the encoder puts one behind every document."""
        tokens = [one.token for one in whole.found]
        if self._pad in tokens:
            raise Reject("pad_inside")
        last = whole.found[-1] if tokens and tokens[-1] == self._eos else None
        ended = last is not None and not whole.text[last.end :].strip()
        if tokens.count(self._eos) > ended and not self.renderer.template.eos_inside:
            raise Reject("eos_inside")
        return (
            (whole.text[: last.start], whole.found[:-1], True) if last and ended else (whole.text, whole.found, False)
        )

    def _broken(self, message: Message) -> Message:
        """A message with marks in whatever of it could read as a control token."""
        return {
            key: value
            if key == "role"
            else self.control.break_text(value)
            if isinstance(value, str)
            else self.control.break_value(value)
            for key, value in message.items()
        }

    def _without(self, messages: Sequence[Message], tools: Sequence[Any] | None, index: int) -> str:
        """An answer as the last message, its reasoning left out."""
        shorter = {key: value for key, value in messages[index].items() if key not in REASONING}
        return self.renderer.render([*messages[:index], shorter], tools)

    def _check_all_seen(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Reject what a template leaves out: marks in it do not change the rendering."""
        for index, message in enumerate(messages):
            for key, marked in _each_seen(message):
                changed = [*messages[:index], marked, *messages[index + 1 :]]
                if self.renderer.render_or_none(changed, tools) == text:
                    raise Reject(f"lost:{message['role']}" if key == "content" else f"unused_field:{key}")
        for index, tool in enumerate(tools or ()):
            assert tools is not None
            if self.renderer.render_or_none(messages, [*tools[:index], _seen_call(tool), *tools[index + 1 :]]) == text:
                raise Reject("unused_field:tools")


def _each_seen(message: Message) -> list[tuple[str, Message]]:
    """The fields of a message that must be seen, each with the message in which it is marked."""
    found = []
    if isinstance(message.get("content"), str) and message["content"].strip():
        found.append(("content", {**message, "content": _mark(message["content"], message["role"])}))
    if message.get("tool_calls"):
        found.append(("tool_calls", {**message, "tool_calls": [_seen_call(call) for call in message["tool_calls"]]}))
    if message.get("name") and message["role"] != "tool":  # whose call has it
        found.append(("name", {**message, "name": _mark(message["name"], "")}))
    return found


def _seen(message: Message) -> Message:
    """A message with a mark in each field that must be seen."""
    for key, marked in _each_seen(message):
        message = {**message, key: marked[key]}
    return message


def _mark(text: str, role: str) -> str:
    """A text with a mark behind its first character; an answer's behind its last, as its reasoning may be dropped."""
    at = len(text.rstrip()) if role == "assistant" else len(text) - len(text.lstrip()) + 1
    return text[:at] + SEEN + text[at:]


def _seen_call(call: Any) -> Any:
    """A tool or a call of one with a mark in its name."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _seen_call(call["function"])}
    name = call.get("name")
    return {**call, "name": _mark(name, "")} if isinstance(name, str) and name else call


def _marks(value: Any) -> int:
    """How many texts of a value are marked as to be seen."""
    if isinstance(value, str):
        return value.count(SEEN)
    if isinstance(value, dict):
        return sum(map(_marks, value.values()))
    return sum(map(_marks, value)) if isinstance(value, list) else 0


def _begins_as(rendered: str, content: object) -> bool:
    """Whether a rendering holds the beginning of an answer's text, whatever white space became of it.

    It begins a little before the answer, whose first words may stand in its prompt (`<think>`).
    """
    if not isinstance(content, str):
        return True
    begins = "".join(content.strip()[:BEGINNING].split())
    return begins in "".join(rendered.split())


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _in_chunks(piece: bytes) -> tuple[bytes, ...]:
    """A long text in pieces, all but the first of which go on with one before."""
    if len(piece) <= CHUNK:
        return (piece,)
    first, *rest = chunks(piece)
    return (type(piece)(first), *map(GoesOn, rest))
