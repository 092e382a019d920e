"""The fast path gives the ids of `tokenizers`, whatever the text holds, and is not taken where that is not proven."""

import glob
import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.engines import VARIABLE
from chimera.convert.encode.equivalence import BYTE_LEVEL, SPLITS, same_character_classes, same_in_pieces
from chimera.convert.encode.texts import _BEFORE_MARK, CUT_CHARACTERS
from chimera.convert.settings import TokenizerSettings
from tests.convert.small_tokenizer import (
    ADDED,
    END,
    EOS,
    PAD,
    REAL_DATA,
    START,
    changed,
    encoder,
    ids_of,
    slow_encoder,
    spec,
    with_added,
)


@pytest.fixture(autouse=True)
def tiktoken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path here is tiktoken's; test_engines.py is about the other."""
    monkeypatch.setenv(VARIABLE, "tiktoken")


real = pytest.mark.skipif(not (REAL_DATA / "tokenizer").is_dir(), reason="the real data is not here")

# What web text can do to a tokenizer: special tokens, added words and pieces of both, spaces of all kinds, elisions.
AWKWARD = [EOS, PAD, START, END, *ADDED, "endare", "cia", "o", "<|", "|>", "<|im_", "'s", "'ll", "'S", "’s", "-"]
AWKWARD += ["\0", " ", "  ", "\n", "\r\n", "\t", "\xa0", "\u2003", "\u200d", "\ufeff", "\x7f"]
AWKWARD += ["1", "²", "Ⅷ", "é", "e\u0301", "🏳️‍🌈", "漢字", "ß"]
texts = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=6), max_size=12).map("".join)


def reference(json_spec: dict[str, Any]) -> Any:
    """`tokenizers` itself with the special tokens taken out, so that their text is only text."""
    from tokenizers import Tokenizer

    plain = [token for token in json_spec["added_tokens"] if not token["special"]]
    return Tokenizer.from_str(json.dumps({**json_spec, "added_tokens": plain}))


@cache
def real_tokenizer() -> tuple[Encoder, Any]:
    raw = (REAL_DATA / "tokenizer" / "tokenizer.json").read_bytes()
    return Encoder(raw, EOS, PAD, "real"), reference(json.loads(raw))


def split_then_bytes(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def byte_level(add_prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}


def digits_then_bytes(individual: bool) -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": individual}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level]}


def every_split(ignore_merges: bool = False) -> dict[str, Any]:
    """The tokenizer with a merge for each way to cut each token in two, in an order of their own (as Llama 3 has)."""
    model = json.loads(spec())["model"]
    vocab, ends = model["vocab"], {EOS, PAD, START, END}
    cut = [(token[:i], token[i:]) for token in vocab.keys() - ends for i in range(1, len(token))]
    both = [list(pair) for pair in cut if set(pair) <= vocab.keys()]
    assert len(both) > len(model["merges"])
    merges = sorted(both, key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    return {**with_added(*ADDED), "model": {**model, "merges": merges, "ignore_merges": ignore_merges}}


def without_type() -> dict[str, Any]:
    model = json.loads(spec())["model"]
    del model["type"]
    return {**with_added(*ADDED), "model": model}


FAST = {
    "byte level": with_added(*ADDED),
    "every split of a token merged, as in Llama 3": every_split(),
    "every split merged, and whole tokens taken": every_split(ignore_merges=True),
    "a model of no type, as in old files": without_type(),
    "a normalizer of no steps": {**with_added(*ADDED), "normalizer": {"type": "Sequence", "normalizers": []}},
    "no added words": with_added(),
    "digits first, as in SmolLM": {**with_added(*ADDED), "pre_tokenizer": digits_then_bytes(individual=True)},
    "split as in Llama 3": {**with_added(*ADDED), "pre_tokenizer": split_then_bytes(SPLITS["Llama 3"])},
    "split that leaves gaps": {**with_added(*ADDED), "pre_tokenizer": split_then_bytes(r"\d|[aeiou ]{2,}")},
}


@pytest.mark.parametrize("name", FAST)
def test_the_fast_path_gives_the_ids_of_tokenizers(name: str) -> None:
    fast, slow, oracle = encoder(FAST[name]), slow_encoder(FAST[name]), reference(FAST[name])
    assert (fast.path, slow.path) == ("tiktoken", "tokenizers")
    special = set(fast.special_ids.values())

    @given(texts)
    def check(text: str) -> None:
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert ids_of(fast, text) == expected
        assert ids_of(slow, text) == expected
        assert not special.intersection(expected)
        assert fast.decode(expected) == text

    check()


@real
def test_the_real_tokenizer_gives_equal_ids_on_all_real_documents() -> None:
    import pyarrow.parquet as pq

    settings = TokenizerSettings(path=str(REAL_DATA / "tokenizer"))
    fast, slow = Encoder.from_settings(settings), Encoder.from_settings(settings, path="tokenizers")
    assert (fast.path, fast.vocab_size, fast.eos_id, fast.pad_id) == ("tiktoken", 32043, 0, 1)
    documents = 0
    for file in sorted(glob.glob(str(REAL_DATA / "*" / "*.parquet"))):
        batch = [Document((text.encode(),)) for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
        for (ours, _), (theirs, _) in zip(fast.encode(batch), slow.encode(batch), strict=True):
            assert np.array_equal(ours, theirs)
        documents += len(batch)
    assert documents > 8000


@real
@given(st.lists(st.sampled_from(["ciao", "quindi", "quello", "perche", "dare"]) | texts, max_size=8).map("".join))
def test_the_real_tokenizer_gives_equal_ids_on_awkward_text(text: str) -> None:
    fast, oracle = real_tokenizer()
    assert ids_of(fast, text) == oracle.encode(text, add_special_tokens=False).ids


def test_both_libraries_class_all_characters_alike() -> None:
    assert same_character_classes(BYTE_LEVEL)
    assert same_character_classes(r"\p{Lu}|\p{Ll}|\p{Lt}|\p{Lm}|\p{Lo}|\p{M}|\d")
    assert not same_character_classes(r"\p{InBasic_Latin}")  # one of them does not know it
    assert not same_character_classes(r"\p{Word}")  # both do, and not alike


USED = [*SPLITS.values(), SPLITS["o200k"].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")]


@pytest.mark.parametrize("regex", USED)
def test_the_regexes_in_use_take_the_fast_path(regex: str) -> None:
    enc = encoder(changed(pre_tokenizer=split_then_bytes(regex)))
    enc.verify_sample(["m² e km³, 'S 2024\u2028 ſ’s"])
    assert enc.path == "tiktoken", enc.reason


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        (r"\w+|[^\w\s]+|\s+", "differently"),  # ² is of `\w` to one of them
        (r"\p{N}{1,3}+|\p{L}++|\s+", "differently"),  # possessive, or repeated
        (r"[[:alpha:]]+|\s+", "differently"),
        (r"^.*$", "differently"),
        (r"(?=(\d{3})+(?!\d))|\p{L}+", "differently"),
        (r"\p{L}*", "empty text"),
        (r"\p{N}|(?i:ss)\p{L}+|\p{L}", "differently"),  # ß is ss to one of them
        (r"(?i:'re|'st)|\p{L}", "differently"),
        (r"\p{Lu}(?:k*|\p{Ll}?|\p{L}a){2,}", "differently"),  # IllAi
        (r"(?:\p{L}?|\s)+", "differently"),
        (r"(?!a|(?!b{2}))\r?", "differently"),  # of no character, but not at the end of a text: tiktoken panics
    ],
)
def test_a_regex_that_could_be_read_otherwise_takes_the_slow_path(regex: str, reason: str) -> None:
    enc = encoder(changed(pre_tokenizer=split_then_bytes(regex)))
    assert enc.path == "tokenizers"
    assert reason in enc.reason


def test_digits_are_cut_out_whatever_unicode_each_library_knows() -> None:
    """Every character, after a letter, a space and another of its kind."""
    enc = encoder(changed(pre_tokenizer=digits_then_bytes(individual=True)))
    assert enc.path == "tiktoken", enc.reason
    characters = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x40000))]
    for start in range(0, len(characters), 1000):
        text = "".join(f"xx{c} {c}{c}" for c in characters[start : start + 1000])
        (fast,), (slow,) = enc._encode_texts([text]), enc._encode_slowly([text])
        assert np.array_equal(fast, slow), hex(start)


BYTES = [(bytes([byte]), byte) for byte in range(256)]


def merges_with(*more: tuple[str, str]) -> dict[str, Any]:
    """The model with merges appended, and their tokens at the end of the vocabulary."""
    found = json.loads(spec())["model"]
    for left, right in more:
        found["vocab"].setdefault(left + right, len(found["vocab"]))
        found["merges"].append([left, right])
    return changed(model=found)


def swapped_ids() -> dict[str, Any]:
    """The model with the ids of the tokens of its first two merges exchanged."""
    found = json.loads(spec())["model"]
    a, b = ("".join(merge) for merge in found["merges"][:2])
    found["vocab"][a], found["vocab"][b] = found["vocab"][b], found["vocab"][a]
    return changed(model=found)


def one_id_twice() -> dict[str, Any]:
    """The model with two more merges, whose tokens have the same id."""
    found = merges_with(("x", "y"), ("y", "q"))
    found["model"]["vocab"]["yq"] = found["model"]["vocab"]["xy"]
    return found


def whole_entry(token: str, added: bool = False) -> dict[str, Any]:
    """A model that takes whole entries, with one that no merge makes; with `added` it is an added word too."""
    model = json.loads(spec())["model"]
    model["vocab"][token] = len(model["vocab"])
    return {**with_added(*[token] * added), "model": {**model, "ignore_merges": True}}


SLOW = {
    "normalizer": (changed(normalizer={"type": "NFC"}), "NFC"),
    "prefix space": (
        changed(pre_tokenizer=byte_level(add_prefix_space=True)),
        "prefix space",
    ),
    "digits together": (changed(pre_tokenizer=digits_then_bytes(individual=False)), "pre-tokenizer"),
    "two tokens of one id": (one_id_twice(), "two tokens have one id"),
    "ids out of order": (swapped_ids(), "order of merges"),
    # x+y comes before x+yq, so that merging x, y, q never makes xyq
    "token out of reach": (merges_with(("x", "y"), ("y", "q"), ("x", "yq")), "does not yield"),
    "one word begins another": (with_added("dare", "darei"), "start of"),
    "out of reach, though taken whole": (
        (lambda s: {**s, "model": {**s["model"], "ignore_merges": True}})(
            merges_with(("x", "y"), ("y", "q"), ("x", "yq"))
        ),
        "does not yield",
    ),
    "taken whole, though never merged": (whole_entry("xqz"), "though no merge makes it"),
    "an added word that reads as a token": (whole_entry("Ġxqz", added=True), "though no merge makes it"),
    "flags": (with_added("dare", single_word=True), "single_word"),
    "words inside a special token": (with_added("endoftext"), "overlaps"),
    "words after a special token": (with_added("|>dopo"), "overlaps"),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_is_not_proven_takes_the_slow_path(name: str) -> None:
    json_spec, reason = SLOW[name]
    enc = encoder(json_spec)
    assert enc.path == "tokenizers"
    assert reason in enc.reason

    from tokenizers import Tokenizer

    oracle = Tokenizer.from_str(json.dumps(json_spec))
    oracle.encode_special_tokens = True

    @given(texts | st.text("xyqz ", max_size=12) | st.just(" xqz"))
    def check(text: str) -> None:
        assert ids_of(enc, text) == oracle.encode(text, add_special_tokens=False).ids

    check()


def test_a_sample_that_differs_leaves_the_fast_path() -> None:
    enc, other = encoder(), encoder(with_added("sedie"))
    enc.verify_sample(["Il gatto dorme.", "ciao"])
    assert enc.path == "tiktoken"
    assert "2 texts" in enc.reason
    enc._engine = other._engine  # which finds a word that it should not
    enc.verify_sample(["Il gatto dorme."])
    assert enc.path == "tiktoken"
    enc.verify_sample(["Il gatto dorme.", "con quattro sedie"])
    assert enc.path == "tokenizers"
    assert ids_of(enc, "con quattro") == ids_of(encoder(), "con quattro")


SIDES = "aZ漢é1²s"


@pytest.mark.parametrize("pre", [*map(split_then_bytes, SPLITS.values()), byte_level(), digits_then_bytes(True)])
def test_a_text_cut_at_a_mark_has_the_ids_of_the_whole(pre: dict[str, Any]) -> None:
    json_spec = {**with_added(*ADDED), "pre_tokenizer": pre, "normalizer": {"type": "NFC"}}
    assert same_in_pieces(json_spec)
    oracle = reference(json_spec)

    def ids(text: str) -> list[int]:
        found: list[int] = oracle.encode(text, add_special_tokens=False).ids
        return found

    @given(st.lists(texts | st.sampled_from([f"{a}{cut}{b}" for a in SIDES for cut in CUT_CHARACTERS for b in SIDES])))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        for mark in _BEFORE_MARK.finditer(text):
            assert ids(text[: mark.start()]) + ids(text[mark.start() :]) == ids(text)

    check()


def test_letters_and_digits_are_the_same_to_the_regex_that_cuts_and_to_tokenizers() -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    ours = "".join(re.findall(r"[^\W_]", "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000))))))
    theirs = Split(Regex(r"[\p{L}\p{N}]+"), "removed", invert=True).pre_tokenize_str(ours)
    assert [piece for piece, _ in theirs] == [ours]


@pytest.mark.parametrize(
    "json_spec",
    [
        with_added("la casa"),
        with_added("a.b"),
        with_added("dare", rstrip=True),
        with_added("dare", lstrip=True),
        changed(pre_tokenizer=byte_level(add_prefix_space=True)),
        changed(normalizer={"type": "Prepend", "prepend": " "}),
        changed(pre_tokenizer=split_then_bytes(r"[^.\n]+|[.\n]+")),
    ],
)
def test_a_tokenizer_that_reaches_over_cuts_is_told_of(json_spec: dict[str, Any]) -> None:
    enc = encoder(json_spec)
    enc.verify_sample(["una casa"])
    assert enc.reason.endswith("; texts above 128 KiB are encoded in pieces, each as its own text")
    assert "in pieces" not in encoder().reason
