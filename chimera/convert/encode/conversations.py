"""Row → turns of a conversation: the usual shapes, roles and fields. What bears meaning is used or refused by name.

A row is read by the fields it has, so one file may hold several shapes:

- a list of messages, `messages` or `conversations`, or the one that the stream's `messages` names;
- a prompt and its answer: `instruction` (with `input`) and `output`, `prompt` and `completion` or `response`,
  `question` and `answer`, Dolly's `instruction` (with `context`) and `response`. With `history` before them, pairs or
  messages. Prompt and completion may be messages too;
- where there is none of these, `conversation`, `query` and `response` or `answer`, `input` and `output`.

Each list may be written as a JSON string. A `system` field begins the conversation.

A field that would change what is learned, and that ChatML has no place for, rejects its row (`unused_field:NAME`),
unless it says nothing: null, empty, a struct of nulls. Any other field is passed over and counted. For another template
`tools`, and of a message `tool_calls`, `reasoning_content` (or `reasoning`, `thinking`), `name` and `tool_call_id` are
read as well; whether the template has a place for them is seen when it renders them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, NamedTuple

from chimera.convert.encode.texts import Reject, Texts, blank, pieces, utf8
from chimera.convert.read.columns import ANSWERS, BESIDE, LISTS, OTHER_LISTS, OTHER_PAIRS, PROMPTS
from chimera.convert.read.parsing import Dropped, parse_json
from chimera.convert.stream_settings import ROLES, MessageKeys

_NAMES = {role: role for role in ROLES}
_NAMES |= {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "prompter": "user"}

PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_SYSTEM = ("system", "system_prompt", "system_message")
_OF_A_PAIR = frozenset((*PROMPTS, *ANSWERS, "input"))
_BEARING = frozenset(BESIDE) - {"input"}
_BEARING_TURN = _BEARING - {*_SYSTEM, "history"} | {"name", "refusal", "train_detail", "mask", "masked"}
_BEARING_TURN |= {"prefix", "channel", "recipient", "tool_call_id"}
_WEIGHTS = frozenset(("weight", "train", "training", "trainable", "train_on_turn", "learn", "loss", "loss_weight"))
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FOR_TEMPLATES = frozenset(("tool_calls", "name", "tool_call_id", *_REASONING))
_PARTS = frozenset((b"text", b"input_text", b"output_text"))  # types of a content's parts that are text
_SAYS_NOTHING = frozenset((b"", b"[]", b"{}", b"null"))


@dataclass(frozen=True)
class Turn:
    """`trained`: whether what an assistant says here is learned. Other roles are seen only."""

    role: str
    content: Texts
    trained: bool = True
    beside: Mapping[str, Any] = field(default_factory=dict)  # what a template may render of it too


class Conversation(NamedTuple):
    """`shape` names the fields the turns are from, `ignored` those that were passed over."""

    turns: list[Turn]
    shape: str
    ignored: list[str]
    tools: list[Any]


class ConversationReader:
    """Reads the rows of one stream. `messages` and `roles` are the stream's settings of these names.

    `template`: for one that may render more than texts.
    """

    def __init__(
        self, messages: MessageKeys | Literal["auto"], roles: Mapping[str, str], template: bool = False
    ) -> None:
        self._template = template
        keys = MessageKeys(list="-") if messages == "auto" else messages
        self._list = None if messages == "auto" else keys.list
        self._role_key, self._content_key = keys.role, keys.content
        self._roles = {**_NAMES, **roles}
        self.unknown_role = ""  # the last

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """The row's conversation. Raises `Reject`."""
        used = self._fields(row)
        system, ignored, tools = None, [], []
        for key, value in row.items():
            if key in used or value is None:
                continue
            if key == "tools" and self._template:
                tools = list(_listed(_plain(value))) if says(value) else []
                continue
            if key in _SYSTEM and says(value) and system is None:
                system = key
            elif key in _BEARING or (len(used) > 1 and key in _OF_A_PAIR):
                if says(value) and not (key in _OF_A_PAIR and any(row.get(name) == value for name in used)):
                    raise Reject(f"unused_field:{key}")
            else:
                ignored.append(key)
        if len(used) == 1:
            turns = self._messages(row[used[0]], ignored, f"{used[0]}[].")
        else:
            turns = self._pair(row, used[0], used[1], used[2], ignored)
        if system:
            turns = _with_system(Turn("system", pieces(row[system])), turns, system)
        return Conversation(turns, "/".join(used[:2]), ignored, tools)

    def _fields(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The list of messages there is, or prompt, answer and what belongs to them."""
        if self._list:
            return self._one(row, self._list)
        for name in LISTS:
            if row.get(name) is not None:
                return (name,)
        for prompt, answer in (*PAIRS, *product(PROMPTS, ANSWERS)):
            if row.get(prompt) is not None and row.get(answer) is not None:
                dolly = (prompt, answer) == ("instruction", "response") and not says(row.get("input"))
                dolly &= isinstance(row.get("context"), (str, bytes)) and says(row["context"])
                return (prompt, answer, "context" if dolly else "input", "history")
        for name in OTHER_LISTS:
            if _are_messages(row.get(name)):
                return (name,)
        for prompt, answer in OTHER_PAIRS:
            if row.get(prompt) is not None and row.get(answer) is not None:
                return (prompt, answer, "" if prompt == "input" else "input", "history")
        raise Reject("missing_field")

    @staticmethod
    def _one(row: Mapping[str, Any], name: str) -> tuple[str]:
        if row.get(name) is None:
            raise Reject("missing_field")
        return (name,)

    def _pair(self, row: Mapping[str, Any], prompt: str, answer: str, more: str, ignored: list[str]) -> list[Turn]:
        """Prompt, with what is given to it under `more`, and answer: texts or messages.

        Of messages only the answer's are learned, as elsewhere.
        """
        turns = self._history(row.get("history"), ignored)
        if _are_messages(row[prompt]):
            if says(row.get(more)):
                raise Reject(f"unused_field:{more}")
            asked = self._messages(row[prompt], ignored, f"{prompt}[].")
            turns += [replace(turn, trained=False) for turn in asked]
        else:
            question = pieces(row[prompt])
            if row.get(more) is not None and not blank(given := pieces(row[more])):
                question = (*question[:-1], question[-1] + b"\n" + given[0], *given[1:])
            turns.append(Turn("user", question))
        if _are_messages(row[answer]):
            return turns + self._messages(row[answer], ignored, f"{answer}[].")
        return [*turns, Turn("assistant", pieces(row[answer]))]

    def _history(self, value: Any, ignored: list[str]) -> list[Turn]:
        if not says(value):
            return []
        turns: list[Turn] = []
        for item in _listed(value):
            if isinstance(item, (list, tuple)) and len(item) == 2:
                turns += [Turn("user", pieces(item[0])), Turn("assistant", pieces(item[1]))]
            else:
                turns += self._messages([item], ignored, "history[].")
        return turns

    def _messages(self, value: Any, ignored: list[str], path: str) -> list[Turn]:
        messages = _listed(value)
        if not all(isinstance(message, Mapping) for message in messages):
            raise Reject("wrong_type")
        passed: dict[str, None] = {}
        turns = [self._turn(message, passed) for message in messages]
        ignored += [path + key for key in passed]
        return turns

    def _turn(self, message: Mapping[str, Any], ignored: dict[str, None]) -> Turn:
        role_key = self._role_key or _first(message, "role", "from")
        content_key = self._content_key or _first(message, "content", "value")
        weights: list[tuple[str, Any]] = []
        beside: dict[str, Any] = {}
        for key, value in message.items():
            if key in (role_key, content_key) or value is None:
                continue
            if key in _WEIGHTS:
                weights.append((key, value))
            elif self._template and key in _FOR_TEMPLATES:
                beside[key] = value
            elif key in _BEARING_TURN:
                if says(value):
                    raise Reject(f"unused_field:{key}")
            else:
                ignored[key] = None
        name = utf8(message.get(role_key)).decode("utf-8", "replace")
        role = self._roles.get(name) or self._roles.get(name.lower())
        if role is None:
            self.unknown_role = name
            raise Reject("unknown_role")
        beside = _beside(beside)
        content = message.get(content_key)
        if content is None and beside:
            content = ""  # a call of tools alone
        if isinstance(content, (list, tuple)):
            content = b"".join(_part(part, ignored) for part in content)
        return Turn(role, pieces(content), _trained(role, weights), beside)


def _trained(role: str, weights: Iterable[tuple[str, Any]]) -> bool:
    """Whether a turn is learned: a weight other than 0 or 1, or 1 of what is never learned, cannot be kept."""
    trained = True
    for key, value in weights:
        if value not in (0, 1) or (value == 1 and role != "assistant"):
            raise Reject(f"unused_field:{key}")
        trained &= bool(value)
    return trained


def _beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has beside its text, as templates are given it."""
    found = {key: _plain(value) for key, value in given.items() if says(value)}
    reasoning = [found.pop(name) for name in _REASONING if name in found]
    if any(text != reasoning[0] for text in reasoning):
        raise Reject("unused_field:reasoning")
    if reasoning:
        found |= dict.fromkeys(("reasoning_content", "thinking"), reasoning[0])  # as templates name it
    if any(not isinstance(value, str) for key, value in found.items() if key != "tool_calls"):
        raise Reject("wrong_type")
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call) for call in _listed(found["tool_calls"])]
    return found


def _call(call: Any) -> Any:
    """A call of a tool with its arguments as the object that a server makes of their JSON."""
    if not isinstance(call, dict):
        raise Reject("wrong_type")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    given = call.get("arguments")
    parsed = parse_json(given.encode()) if isinstance(given, str) else None
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


def _plain(value: Any) -> Any:
    """A value of JSON with its texts as `str`. Of a table, whose texts are bytes, without the nulls of its structs."""
    if isinstance(value, (str, bytes)):
        return b"".join(pieces(value)).decode()
    if isinstance(value, Mapping):
        table = any(isinstance(item, bytes) for item in value.values())
        return {_plain(key): _plain(item) for key, item in value.items() if item is not None or not table}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _part(part: object, ignored: dict[str, None]) -> bytes:
    """A piece of a message's content: a text, or `{type: text, text: …}`."""
    if not isinstance(part, Mapping):
        return utf8(part)
    kind = part.get("type")
    if kind is not None and utf8(kind) not in _PARTS:
        raise Reject("unused_field:content")
    for key, value in part.items():
        if key not in ("type", "text") and says(value):
            if key in _BEARING_TURN or key.endswith(("_url", "_data")):
                raise Reject("unused_field:content")
            ignored[f"content[].{key}"] = None
    return utf8(part.get("text"))


def _with_system(first: Turn, turns: list[Turn], field: str) -> list[Turn]:
    """A conversation that begins with its `system` field, unless it does already."""
    if turns and turns[0].role == "system" and not blank(turns[0].content):
        if turns[0].content != first.content:
            raise Reject(f"unused_field:{field}")
        return turns
    return [first, *turns]


def says(value: object) -> bool:
    """Whether there is anything in a field: in a table every row has all of them."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value.strip() not in _SAYS_NOTHING
    if isinstance(value, Mapping):
        return any(map(says, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(says, value))
    return value is not None


def _are_messages(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _listed(value: object) -> Sequence[Any]:
    """A list, or one that is written as JSON."""
    if isinstance(value, (str, bytes)):
        value = parse_json(utf8(value))
        if isinstance(value, Dropped) and value.reason == "too_many_values":
            raise Reject(value.reason)
    if not isinstance(value, (list, tuple)):
        raise Reject("wrong_type")
    return value


def _first(message: Mapping[str, Any], usual: str, other: str) -> str:
    return other if message.get(usual) is None and message.get(other) is not None else usual
