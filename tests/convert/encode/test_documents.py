"""Rows to documents: what is kept, how a conversation is rendered, and why a row is dropped."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from chimera.cli import UserError
from chimera.convert.encode import texts
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.texts import chunks
from chimera.convert.read import parsing
from chimera.convert.read.parsing import Dropped, parse_line
from chimera.convert.settings import BuildSettings, TokenizerSettings
from chimera.convert.stream_settings import SourceSettings, StreamSettings
from tests.convert.small_tokenizer import END, START, encoder

S, E = 2, 3
CHAT = DocumentReader(StreamSettings(format="chatml"), {START: S, END: E})
TEXT = DocumentReader(StreamSettings(format="text", min_chars=5), {})


def rejected(reason: str) -> Dropped:
    return Dropped("rejected", reason)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"}', {"text": "a"}),
        ('{"text": "a"}\r', {"text": "a"}),
        ('{"text": ', rejected("unparseable")),
        ("[" * 100_000, rejected("unparseable")),
        ('{"n": ' + "9" * 5000 + "}", rejected("unparseable")),
        ('{"text": "a", "text": "b"}', rejected("duplicate_key")),
        ('{"text": "' + "è" * 600_000 + '", "of": {"a": 1, "b": 2, "\\u0061": 3}}', rejected("duplicate_key")),
        ('["a"]', rejected("not_an_object")),
        ('"text"', rejected("not_an_object")),
        ("null", rejected("not_an_object")),
    ],
)
def test_a_line_is_an_object_or_rejected(line: str, expected: object) -> None:
    assert parse_line(line.encode()) == expected


def test_a_long_line_of_more_values_than_fit_memory_is_rejected_unparsed() -> None:
    marks = json.dumps({"text": 'a, "b": [c] {d} \\' * 200_000}).encode()
    found = parse_line(marks)
    assert isinstance(found, dict)
    assert found == json.loads(marks)
    assert parse_line(marks[:-1] + b', "x": [' + b"[]," * 600_000 + b"0]}") == rejected("too_many_values")


ESCAPES = [
    r"\udc80\udc00",
    r"\udc00",
    r"\udc80",
    r"\udcc3\udca9",
    r"\ud83d\ude00",
    r"\ud83d\udc80",
    r"\\udc80",
    r"\\\uDCA9",
    r"\u00e9",
    r"\ud800",
]
TROUBLE = st.sampled_from(
    ["è", "東", "😀", "\\", '"', "n", "u00e9", "ud83d", "udcc3", "udca9", "\ud800", "\0", *ESCAPES]
)


@given(st.lists(TROUBLE, max_size=12), st.lists(TROUBLE, max_size=4), st.booleans())
@example(["è", r"\udc8", "n"], [], True)
def test_a_long_line_is_parsed_as_a_short_one(text: list[str], other: list[str], whole: bool) -> None:
    said = "".join(other)
    line = f'{{"{said}": ["", {{"a": "{said}"}}, 1], "text": "{"".join(text)}"{"}" * whole}'
    raw = line.encode("utf-8", "surrogatepass")
    reader = DocumentReader(StreamSettings(format="text", min_chars=0), {})

    def outcome() -> object:
        found = parse_line(raw)
        return found if isinstance(found, Dropped) else reader.read(found)

    wanted = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "LONG_LINE", 1)
        assert outcome() == wanted
        for module in (texts, parsing):
            patch.setattr(module, "CHUNK", 9)
        found = outcome()
        if isinstance(wanted, Document):
            assert found == Document(tuple(chunks(b"".join(wanted.texts))))
        else:
            assert found == wanted


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("una casa, un albero di", ["una", " casa, un", " albero di"]),  # a space before any other mark
        ("alfa, beta\ngamma,delta e", ["alfa, beta", "\ngamma", ",delta e"]),
        ("東京。大、奈良", ["東京", "。大", "、奈良"]),
        ("12,3\n45,6\n789", ["12,3\n45,6", "\n789"]),
        ("a  b --  c -d", ["a  b --  c -", "d"]),  # none: anywhere
        ("é東京大阪都", ["é東京大", "阪都"]),
    ],
)
def test_a_long_text_is_cut_before_a_mark_between_letters_or_digits(
    text: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHUNK", 12)
    assert [piece.decode() for piece in chunks(text.encode())] == pieces


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "12345"}, Document((b"12345",))),
        ({"text": "1234"}, Dropped("filtered", "too_short")),
        ({"text": "perché".encode()}, Document(("perché".encode(),))),
        ({"text": b"caf\xe9 au lait"}, rejected("invalid_utf8")),
        ({"text": None}, rejected("missing_field")),
        ({"other": "12345"}, rejected("missing_field")),
        ({"text": 12345}, rejected("wrong_type")),
        ({"text": ["12345", 6]}, rejected("wrong_type")),
        ({"text": {"text": "12345"}}, rejected("wrong_type")),
        ({"text": "123\0 45"}, rejected("nul")),
        ({"text": "12345 \ud83d"}, rejected("lone_surrogate")),
        ("12345", rejected("not_an_object")),
    ],
)
def test_text_rows(row: object, expected: object) -> None:
    assert TEXT.read(row) == expected


def test_the_text_column_is_the_sources() -> None:
    reader = DocumentReader(StreamSettings(min_chars=None), {}, column="body")
    assert reader.read({"body": "x", "text": "y"}) == Document((b"x",))


def test_an_instruction_pair_becomes_one_exchange() -> None:
    found = CHAT.read({"instruction": "Somma", "input": "1+1", "output": "2"})
    assert found == Document(
        pieces=(S, b"user\nSomma\n1+1", E, b"\n", S, b"assistant\n", b"2", E),
        assistant=(False, False, False, False, False, False, True, True),
    )


@pytest.mark.parametrize("given_input", [{}, {"input": None}, {"input": ""}, {"input": "  "}])
def test_an_input_that_says_nothing_is_left_out(given_input: dict[str, object]) -> None:
    found = CHAT.read({"instruction": "Ciao", "output": "Ciao!", **given_input})
    assert isinstance(found, Document)
    assert found.pieces[1] == b"user\nCiao"


def test_messages_keep_their_roles_and_order() -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    found = CHAT.read({"messages": [{"role": role, "content": f"c{i}"} for i, role in enumerate(roles)]})
    assert isinstance(found, Document)
    assert b"".join(found.texts).decode() == "\n".join(f"{role}\nc{i}" for i, role in enumerate(roles))
    said = [piece for piece, flag in zip(found.pieces, found.assistant, strict=True) if flag]
    assert said == [b"c2", E, b"c4", E]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a"}, rejected("missing_field")),
        ({"output": "a"}, rejected("missing_field")),
        ({"instruction": "a", "output": 42}, rejected("wrong_type")),
        ({"instruction": "a", "input": ["b"], "output": "c"}, rejected("wrong_type")),
        ({"instruction": "a", "output": "\udc00"}, rejected("lone_surrogate")),
        ({"instruction": "a\0", "output": "b"}, rejected("nul")),
        ({"instruction": "a", "output": " "}, Dropped("filtered", "empty_message")),
        ({"instruction": " ", "output": "b"}, Dropped("filtered", "empty_message")),
        ({"messages": "hello"}, rejected("wrong_type")),
        ({"messages": ["hello"]}, rejected("wrong_type")),
        ({"messages": [{"role": "user"}]}, rejected("missing_field")),
        ({"messages": [{"role": "observation", "content": "x"}]}, rejected("unknown_role")),
        ({"messages": []}, Dropped("filtered", "no_answer")),
        ({"messages": [{"role": "user", "content": "x"}]}, Dropped("filtered", "no_answer")),
    ],
)
def test_conversations_that_are_dropped(row: object, expected: Dropped) -> None:
    assert CHAT.read(row) == expected


def test_a_chat_stream_needs_the_chat_tokens() -> None:
    with pytest.raises(UserError, match=r"<\|im_end\|>.*chatml"):
        DocumentReader(StreamSettings(format="chatml"), {START: S})


def test_the_token_that_ends_messages_cannot_end_documents() -> None:
    stream = StreamSettings(format="chatml", sources=[SourceSettings(files=["a.jsonl"])])
    tokenizer = TokenizerSettings(path="tok", eos_token=END)
    with pytest.raises(ValidationError, match=r"tokenizer.eos_token`: .*streams.talk"):
        BuildSettings(output="out", tokenizer=tokenizer, streams={"talk": stream})


def test_a_prompt_gets_the_ids_it_was_trained_with() -> None:
    """What a chat prompt encodes to is the beginning of what the same conversation was stored as."""
    enc = encoder()
    reader = DocumentReader(StreamSettings(format="chatml"), enc.special_ids)
    row = {"instruction": "\n\t  perche dare?", "output": " 12 ciao"}
    document = reader.read(row)
    assert isinstance(document, Document)
    ((stored, mask),) = enc.encode([document])
    assert mask is not None
    prompt = Document((enc.special_ids[START], b"user\n\n\t  perche dare?", enc.special_ids[END], b"\n"))
    prompt = Document((*prompt.pieces, enc.special_ids[START], b"assistant\n"))
    ((ids, _),) = enc.encode([prompt])
    assert stored[: len(ids) - 1].tolist() == ids[:-1].tolist()
    assert mask.tolist() == [False] * (len(ids) - 1) + [True] * (len(stored) - len(ids)) + [False]
    assert enc.decode(stored[mask].tolist()) == f" 12 ciao{END}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["messages", "instruction", "input", "output", "text", "role", "content"])


@given(st.dictionaries(keys, json_values | st.lists(st.dictionaries(keys, json_values, max_size=3), max_size=3)))
def test_any_object_is_a_document_or_dropped_with_a_reason(row: dict[str, object]) -> None:
    parsed = parse_line(json.dumps(row).encode())
    assert parsed == row
    for reader in (TEXT, CHAT):
        found = reader.read(row)
        if isinstance(found, Document):
            assert "\0" not in b"".join(found.texts).decode()
            assert len(found.assistant) in (0, len(found.pieces))
        else:
            assert found.reason.replace("_", "").replace(":", "").isalpha()
