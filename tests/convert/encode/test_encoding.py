"""Documents to ids: text is only text, special tokens come by id, and no length or tokenizer upsets it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera.cli import UserError
from chimera.convert.encode import texts as texts_of
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.engines import VARIABLE, Tiktoken
from chimera.convert.encode.equivalence import byte_characters
from chimera.convert.settings import TokenizerSettings
from tests.convert.small_tokenizer import END, EOS, PAD, START, changed, encoder, ids_of, slow_encoder, spec, with_added


def test_pieces_are_encoded_apart_and_special_tokens_come_by_id() -> None:
    enc = encoder()
    start, end = enc.special_ids[START], enc.special_ids[END]
    document = Document((start, b"dare", b"dare", end, f"{START}x{EOS}".encode()), (False, True, False, True, False))
    ((ids, mask),) = enc.encode([document])
    assert mask is not None
    word = ids_of(enc, "dare")
    tail = ids_of(enc, f"{START}x{EOS}")
    assert ids.tolist() == [start, *word, *word, end, *tail, enc.eos_id]
    assert mask.tolist() == [False, *[True] * len(word), *[False] * len(word), True, *[False] * len(tail), False]
    assert not {start, end, enc.eos_id, enc.pad_id}.intersection(tail)


@pytest.mark.parametrize("make", [encoder, slow_encoder])
@pytest.mark.parametrize(
    "text",
    [
        "casa bianca, 12 sedie ciao " * 40,
        "abcdefghij" * 100,  # no place to cut
        " " * 1000 + "x",
        "1 2 3 4 5 6 7 8 9 " * 50 + "una casa bianca " * 10,
    ],
)
def test_long_texts_lose_nothing(text: str, make: Callable[[], Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    enc = make()
    whole = ids_of(enc, text)
    monkeypatch.setattr(texts_of, "CHUNK", 100)
    ids = ids_of(enc, text)
    assert enc.decode(ids) == text
    assert max(map(len, texts_of.chunks(text.encode()))) <= 100
    if "casa bianca, 12" in text:
        assert ids == whole


@pytest.mark.parametrize(
    "text", [" " * 300_000 + "x", "a" * 300_000, "漢" * 200_000], ids=["spaces", "letters", "kanji"]
)
def test_runs_without_end_are_encoded(text: str) -> None:
    enc = encoder()
    ids = ids_of(enc, text)
    assert enc.decode(ids) == text


def test_what_the_regex_engine_of_tiktoken_gives_up_on_goes_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_of, "CHUNK", 1 << 21)
    monkeypatch.setenv(VARIABLE, "tiktoken")
    enc, text = encoder(), " " * 1_100_000 + "x"
    assert isinstance(enc._engine, Tiktoken)
    with pytest.raises(ValueError, match="stack size exceeded"):
        enc._engine.encoding.encode_to_numpy(text, disallowed_special=())
    assert ids_of(enc, text) == ids_of(slow_encoder(), text)


def test_a_large_vocabulary_is_stored_in_32_bits() -> None:
    model = json.loads(spec())["model"]
    assert encoder().dtype == np.uint16
    model["vocab"].update({f"unused {i}": i for i in range(len(model["vocab"]), 70_000)})
    enc = encoder(changed(model=model))
    assert (enc.vocab_size, enc.dtype, enc.path) == (70_000, np.uint32, "fastokens")
    assert ids_of(enc, "Il gatto") == ids_of(encoder(changed()), "Il gatto")


def test_end_and_padding_are_special_even_where_the_tokenizer_does_not_say_so() -> None:
    tokens = [{**token, "special": False} for token in json.loads(spec())["added_tokens"]]
    enc = encoder(changed(added_tokens=tokens))
    assert set(enc.special_ids) == {EOS, PAD, START, END}
    assert enc.eos_id not in ids_of(enc, f"before {EOS} after")


def test_a_stream_keeps_to_itself_what_its_sample_decided(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(spec())
    settings = TokenizerSettings(path=str(tmp_path))
    one, other = Encoder.from_settings(settings), Encoder.from_settings(settings)
    one.leave_fast_path("of this stream")
    assert (one.path, other.path) == ("tokenizers", "fastokens")
    assert Encoder.from_settings(settings, one.path).path == "tokenizers"
    assert Encoder.from_settings(settings, other.path).path == "fastokens"
    assert ids_of(one, "Il gatto") == ids_of(other, "Il gatto")


def unigram() -> dict[str, Any]:
    """A tokenizer whose model itself makes the EOS token of the text `</s>`."""
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["<pad>", 0.0], *[[c, -2.0] for c in "abcs<>/ "]]
    pieces += [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{**token, "id": 1, "content": "</s>"}, {**token, "id": 2, "content": "<pad>"}],
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True},
    }


# On both of these `tokenizers` panics: where it loads the file, and at the first text.
NO_MAP = {"type": "Precompiled", "precompiled_charsmap": ""}
NO_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("raw", "eos", "pad", "message"),
    [
        (b"{", EOS, PAD, "not readable as a tokenizer"),
        (b'{"model": 3}', EOS, PAD, "not readable as a tokenizer"),
        (spec().encode(), "</s>", PAD, r"eos_token '</s>' is not among .*im_end"),
        (spec().encode(), EOS, "<pad>", "pad_token '<pad>' is not among"),
        (spec().encode(), EOS, EOS, "must differ"),
        (json.dumps(unigram()).encode(), "</s>", "<pad>", r"plain text '</s>' as the special token '</s>' \(id 1\)"),
    ],
)
def test_tokenizers_that_are_refused(raw: bytes, eos: str, pad: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Encoder(raw, eos, pad, "x.json")


def lacking(*lost: int, **parts: Any) -> dict[str, Any]:
    """The tokenizer without some bytes; `parts` go into its model."""
    without = {byte_characters()[byte] for byte in lost}
    model = json.loads(spec())["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if not without.intersection(token)}
    model["merges"] = [merge for merge in model["merges"] if not without.intersection("".join(merge))]
    return changed(model={**model, **parts})


def words(unknown: str, model: str = "WordLevel") -> dict[str, Any]:
    vocab = {EOS: 0, PAD: 1, START: 2, END: 3, "[UNK]": 4, "casa": 5}
    parts = {"unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return changed(model={"type": model, "vocab": vocab, **parts}, pre_tokenizer={"type": "Whitespace"})


def with_special(content: str, **parts: Any) -> dict[str, Any]:
    """The tokenizer with one more special token, whose text its vocabulary may hold; `parts` go into its model."""
    found = with_added(content, special=True)
    id_ = found["model"]["vocab"].setdefault(content, len(found["model"]["vocab"]))
    found["added_tokens"][-1]["id"] = id_
    found["model"].update(parts)
    return found


SMILE = "😀".encode()
TEXT_LOST = {
    "bytes are missing": (lacking(*SMILE), "would be lost: use a byte-level BPE tokenizer with all 256 bytes"),
    "bytes are the end": (lacking(*SMILE, unk_token=EOS), r"would become the token '<\|endoftext\|>'"),
    "bytes end a message": (lacking(*SMILE, unk_token=END), r"would become the token '<\|im_end\|>'"),
    "not all bytes to fall back on": (
        changed(model={"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}),
        "lost",
    ),
    "words": (words(EOS), "would become the token"),
    "pieces of words": (words(EOS, "WordPiece"), "would become the token"),
    "words of no such token": (words("<?>"), "would be lost"),
    "words of a plain token": (words("[UNK]"), r"\(WordLevel\) .* would become the token '\[UNK\]'"),
    "pieces of a plain token": (words("[UNK]", "WordPiece"), r"\(WordPiece\) .* would become the token '\[UNK\]'"),
    "a byte": (with_special("Ċ"), r"takes bytes of plain text as the special token 'Ċ' \(id \d+\)"),
    "half a character": (with_special("Ã"), "takes bytes of plain text as the special token 'Ã'"),
    "a merge": (with_special("ca"), "takes bytes of plain text as the special token 'ca'"),
    "a whole entry": (
        with_special("Ġqzx", ignore_merges=True),
        "encodes the plain text .* as the special token 'Ġqzx'",
    ),
}


@pytest.mark.parametrize("name", TEXT_LOST)
def test_a_tokenizer_that_loses_text_or_makes_special_tokens_of_it_is_refused(name: str) -> None:
    json_spec, message = TEXT_LOST[name]
    with pytest.raises(UserError, match=message):
        encoder(json_spec)


def with_byte_fallback() -> dict[str, Any]:
    """As Llama 2 has it: the special `<unk>` is never used, since each byte has a token."""
    names = ["<unk>", EOS, PAD, START, END, *(f"<0x{byte:02X}>" for byte in range(256)), "c", "a"]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": [], "unk_token": "<unk>"}
    tokens = [{**token, "id": i + 1} for i, token in enumerate(json.loads(spec())["added_tokens"])]
    tokens.append({**tokens[0], "id": 0, "content": "<unk>"})
    return {"version": "1.0", "added_tokens": tokens, "model": {**model, "byte_fallback": True}}


def unigram_of_bytes() -> dict[str, Any]:
    """A piece that is not known is its bytes, and the special tokens are none of the model's pieces."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁casa", "▁"]
    model = {"type": "Unigram", "unk_id": 0, "vocab": [[name, -1.0] for name in names], "byte_fallback": True}
    tokens = [{**token, "id": len(names) + i} for i, token in enumerate(json.loads(spec())["added_tokens"])]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {"version": "1.0", "added_tokens": tokens, "model": model, "normalizer": spaces}


@pytest.mark.parametrize("json_spec", [with_byte_fallback(), unigram_of_bytes(), lacking(0xC0, 0xF5, 0xFF)])
def test_a_tokenizer_that_loses_no_text_is_taken(json_spec: dict[str, Any]) -> None:
    enc = encoder(json_spec)
    assert ids_of(enc, "casa 😀")
    assert not set(enc.special_ids.values()).intersection(ids_of(enc, f"casa 😀 {EOS}"))


def test_a_tokenizer_that_puts_something_before_each_text_is_refused_for_conversations() -> None:
    encoder().check_chat("streams.talk")
    for part in (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "Prepend", "prepend": " "}},
    ):
        with pytest.raises(UserError, match=r"streams.talk: `format: chatml` .* without prefix"):
            encoder(changed(**part)).check_chat("streams.talk")


def test_a_model_that_drops_merges_at_random_does_not_here() -> None:
    dropping = json.loads(spec())
    dropping["model"]["dropout"] = 0.5
    assert ids_of(encoder(dropping), "Il gatto dorme.") == ids_of(encoder(json.loads(spec())), "Il gatto dorme.")


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.path: .*train_tokenizer.py"):
        Encoder.from_settings(TokenizerSettings(path=str(tmp_path)))
