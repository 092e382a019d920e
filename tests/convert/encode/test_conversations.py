"""Rows to conversations: every usual shape gives the same turns, and what bears meaning is used or named."""

import json
from typing import Any

import numpy as np
import pytest

from chimera.cli import UserError
from chimera.config import validated
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.too_long import shortened
from chimera.convert.read.parsing import Dropped
from chimera.convert.settings import BuildSettings
from chimera.convert.stream_settings import StreamSettings
from tests.convert.builds import as_bytes
from tests.convert.small_tokenizer import END, START

S, E = 2, 3
QUESTION, ANSWER = "Che vento soffia?", "La brezza."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Che vento "}, {"type": "text", "text": "soffia?"}]}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ONE = Document(
    (S, f"user\n{QUESTION}".encode(), E, b"\n", S, b"assistant\n", ANSWER.encode(), E), (*[False] * 6, True, True)
)


def reader(**settings: Any) -> DocumentReader:
    return DocumentReader(StreamSettings(format="chatml", **settings), {START: S, END: E})


def said(row: dict[str, Any], **settings: Any) -> Any:
    """`role: content` of each turn, `!` before one that is learned, or why there is none; the same of a table's row."""
    found = reader(**settings).read(row)
    assert found == reader(**settings).read(as_bytes(row))
    if isinstance(found, Dropped):
        return found.reason
    turns, learned = [], []
    for piece, flag in zip(found.pieces, found.assistant, strict=True):
        if piece == S:
            turns.append("")
        elif isinstance(piece, bytes) and piece != b"\n":
            turns[-1] += piece.decode()
        elif piece == E:
            learned.append("!" * flag)
    return [mark + turn.replace("\n", ": ", 1) for mark, turn in zip(learned, turns, strict=True)]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": MESSAGES}, "messages"),
        ({"messages": json.dumps(MESSAGES)}, "messages"),
        ({"messages": [*PARTS, MESSAGES[1]]}, "messages"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"conversations": json.dumps(SHAREGPT), "messages": None}, "conversations"),
        ({"conversations": MESSAGES}, "conversations"),
        ({"conversations": [SHAREGPT[0], {"role": "model", "value": ANSWER}]}, "conversations"),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, "instruction/output"),
        ({"prompt": QUESTION, "completion": ANSWER}, "prompt/completion"),
        ({"prompt": QUESTION, "response": ANSWER}, "prompt/response"),
        ({"question": QUESTION, "answer": ANSWER}, "question/answer"),
        ({"question": QUESTION, "response": ANSWER}, "question/response"),
        ({"instruction": QUESTION, "context": "", "response": ANSWER}, "instruction/response"),
        ({"conversation": MESSAGES}, "conversation"),
        ({"query": QUESTION, "response": ANSWER}, "query/response"),
        ({"query": QUESTION, "answer": ANSWER}, "query/answer"),
        ({"input": QUESTION, "output": ANSWER}, "input/output"),
        ({"messages": [{"role": "prompter", "content": QUESTION}, MESSAGES[1]]}, "messages"),
        ({"conversations": [{"from": "Human", "value": QUESTION}, {"from": "GPT", "value": ANSWER}]}, "conversations"),
        ({"prompt": [MESSAGES[0]], "completion": [MESSAGES[1]]}, "prompt/completion"),
        ({"prompt": [MESSAGES[0]], "completion": ANSWER}, "prompt/completion"),
        ({"prompt": QUESTION, "completion": ANSWER, "question": QUESTION}, "prompt/completion"),
        ({"messages": MESSAGES, "tools": None, "system": "", "history": [], "tool_calls": "[]"}, "messages"),
        ({"messages": [{**MESSAGES[0], "name": None}, {**MESSAGES[1], "tool_calls": [{"id": None}]}]}, "messages"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "train": True}]}, "messages"),
    ],
)
def test_every_usual_shape_gives_the_same_document(row: dict[str, Any], shape: str) -> None:
    for found in (reader().read(row), reader().read(as_bytes(row))):
        assert found == ONE
        assert isinstance(found, Document)
        assert found.shape == shape
        old = shape in ("messages", "instruction/output")  # whose manifests are as they were
        assert found.counted in ((), (("ignored", "question"),)) if old else ("shapes", shape) in found.counted


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"system": "S", "messages": MESSAGES}, ["system: S", f"user: {QUESTION}", f"!assistant: {ANSWER}"]),
        ({"system_prompt": "S", "question": "a", "response": "b"}, ["system: S", "user: a", "!assistant: b"]),
        ({"system": "S", "messages": [{"role": "system", "content": "S"}, *MESSAGES]}, 3),
        ({"system": "S", "messages": [{"role": "system", "content": " "}, *MESSAGES]}, 3),
        (
            {"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]], "system": "S"},
            ["system: S", "user: a", "!assistant: b", "user: c\nd", "!assistant: e"],
        ),
        ({"instruction": "a", "context": "c", "response": "b"}, ["user: a\nc", "!assistant: b"]),
        ({"instruction": "a", "context": "c", "output": "b"}, "unused_field:context"),
        ({"prompt": "a", "context": "c", "response": "b"}, "unused_field:context"),
        ({"input": "a", "output": "b", "system": "S"}, ["system: S", "user: a", "!assistant: b"]),
        ({"prompt": "a", "completion": "b", "history": json.dumps(MESSAGES)}, 4),
        (
            {"prompt": [*MESSAGES, {"role": "user", "content": "a"}], "completion": "b"},
            [f"user: {QUESTION}", f"assistant: {ANSWER}", "user: a", "!assistant: b"],
        ),
        (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES]},
            [f"user: {QUESTION}", f"assistant: {ANSWER}", f"user: {QUESTION}", f"!assistant: {ANSWER}"],
        ),
        ({"conversations": [*SHAREGPT, SHAREGPT[0], {**SHAREGPT[1], "train": False}]}, 4),
        (
            {"messages": [{"role": "developer", "content": "D"}, MESSAGES[0], {"role": "function", "content": "F"}]},
            "no_answer",
        ),
        (
            {"messages": [{"role": "developer", "content": "D"}, {"role": "function", "content": "F"}, MESSAGES[1]]},
            ["developer: D", "tool: F", f"!assistant: {ANSWER}"],
        ),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, "nothing_trained"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "loss": False, "training": True}]}, "nothing_trained"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "masked": True}]}, "unused_field:masked"),
    ],
)
def test_what_stands_beside_the_turns_is_used(row: dict[str, Any], turns: Any) -> None:
    found = said(row)
    assert len(found) == turns if isinstance(turns, int) else found == turns


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": MESSAGES, "tools": [{"name": "meteo"}]}, "tools"),
        ({"messages": MESSAGES, "tools": json.dumps([{"name": "meteo"}])}, "tools"),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "tool_calls",
        ),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "Penso."}]}, "reasoning_content"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "function_call": {"name": "meteo"}}]}, "function_call"),
        ({"messages": [{**MESSAGES[0], "name": "Anna"}, MESSAGES[1]]}, "name"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}]}, "weight"),
        ({"messages": [{**MESSAGES[0], "train": True}, MESSAGES[1]]}, "train"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, MESSAGES[1]]}, "content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a", "image_url": {"url": "x"}}]}, MESSAGES[1]]},
            "content",
        ),
        ({"system": "S", "messages": [{"role": "system", "content": "T"}, *MESSAGES]}, "system"),
        ({"system": "S", "system_prompt": "T", "messages": MESSAGES}, "system_prompt"),
        ({"messages": MESSAGES, "history": [["a", "b"]]}, "history"),
        ({"instruction": "a", "context": ["b"], "response": "c"}, "context"),
        ({"instruction": "a", "context": "b", "input": "d", "response": "c"}, "context"),
        ({"question": "a", "answer": "b", "response": "c"}, "response"),
        ({"prompt": "a", "completion": "b", "reasoning": "c"}, "reasoning"),
        ({"prompt": [MESSAGES[0]], "completion": "b", "input": "c"}, "input"),
    ],
)
def test_what_would_change_the_meaning_and_has_no_place_costs_the_row(row: dict[str, Any], field: str) -> None:
    assert said(row) == f"unused_field:{field}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "missing_field"),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "missing_field"),
        ({"conversations": "non è JSON"}, "wrong_type"),
        ({"conversations": '{"from": "human"}'}, "wrong_type"),
        ({"conversations": [{"from": "chatgpt", "value": "a"}]}, "unknown_role"),
        ({"conversations": [{"from": 7, "value": "a"}]}, "wrong_type"),
        ({"messages": [{"role": "user", "content": [7]}]}, "wrong_type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_field"),
        ({"messages": [{"role": "user", "content": []}, MESSAGES[1]]}, "empty_message"),
        ({"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}, "wrong_type"),
    ],
)
def test_what_is_no_conversation_is_dropped(row: dict[str, Any], reason: str) -> None:
    assert said(row) == reason


def test_names_of_the_users_own() -> None:
    row = {"dialog": [{"who": "io", "what": QUESTION}, {"who": "gpt", "what": ANSWER}], "prompt": "P", "topic": "venti"}
    names = {"list": "dialog", "role": "who", "content": "what"}
    assert said(row) == "missing_field"
    found = reader(messages=names, roles={"io": "user"}).read(row)
    assert found == ONE
    assert isinstance(found, Document)
    assert found.counted == (("ignored", "prompt"), ("ignored", "topic"), ("shapes", "dialog"))
    assert said({"dialog": SHAREGPT}, messages={"list": "dialog"}) == said({"conversations": SHAREGPT})
    assert said({"messages": MESSAGES}, messages=names) == "missing_field"


def test_other_fields_are_named() -> None:
    turns = [{**MESSAGES[0], "id": 1}, {**MESSAGES[1], "id": 2, "score": 0.5}]
    found = reader().read({"messages": turns, "source": "diario", "prompt": "P", "note": None})
    assert isinstance(found, Document)
    assert found.counted == tuple(
        ("ignored", name) for name in ("source", "prompt", "messages[].id", "messages[].score")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"too_long": "truncate"}, r"too_long` is 'truncate'; it must be cut, drop or turns"),
        ({"too_long": "drop"}, r"too_long: drop` keeps conversations whole, which `packing: concat` cuts"),
        ({"messages": {"role": "from"}}, r"messages`: auto, or \{list: ..., role: ..., content: ...\}"),
        ({"messages": "conversations"}, r"messages` is 'conversations'; it must be auto, or"),
        ({"roles": {"bot": "robot"}}, r"roles.bot` is 'robot'; it must be system, developer, user, assistant or tool"),
        ({"format": "text", "roles": {"bot": "assistant"}}, r"`roles` is for conversations"),
    ],
)
def test_settings_of_conversations_are_checked(changes: dict[str, Any], message: str) -> None:
    stream = {"format": "chatml", "sources": [{"files": ["a.jsonl"]}], **changes}
    build = {"output": "out", "tokenizer": {"path": "tok"}, "streams": {"talk": stream}}
    with pytest.raises(UserError, match=rf"streams\.talk.*{message}"):
        validated(BuildSettings, build, "shards.yaml")


def test_a_conversation_ends_with_its_last_answer_that_fits_and_is_learned() -> None:
    mask, ids = np.zeros(30, bool), np.arange(31)
    mask[[8, 9, 18, 19, 28]] = True
    assert shortened(ids, [10, 20, 29], mask, 21) == 20
    assert shortened(ids, [10, 20, 29], mask, 20) == 10  # an EOS follows
    assert shortened(ids, [10, 20, 29], mask, 10) is None
    ids[9] = ids[19] = ids[-1]  # the answers end with EOS
    assert [shortened(ids, [10, 20, 29], mask, room) for room in (20, 19, 10)] == [20, 10, 10]
    mask[:10] = False
    assert shortened(ids, [10, 20, 29], mask, 15) is None
