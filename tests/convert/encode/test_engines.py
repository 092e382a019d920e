"""Engines: the ids of `tokenizers` by each of them, and what is done where one is not sure to give them."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.cli import UserError
from chimera.convert.encode import fastokens_engine, sweep
from chimera.convert.encode.engines import NAMES, VARIABLE, Fastokens, Tokenizers
from chimera.convert.encode.equivalence import SPLITS, NotEquivalent
from tests.convert.encode.test_equivalence import (
    AWKWARD,
    byte_level,
    every_split,
    merges_with,
    reference,
    split_then_bytes,
    swapped_ids,
    texts,
)
from tests.convert.small_tokenizer import ADDED, changed, encoder, ids_of, slow_encoder, spec, with_added

pytest.importorskip("fastokens", reason="the engine has no wheels here")
FEW = (range(1, 0x200), range(0x2000, 0x2010), range(0x3400, 0x3410), range(0x20000, 0x20010), range(0xFFFF0, 0xFFFFF))


@pytest.fixture
def few_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A sweep of few characters and kinds, kept in a folder of its own, which this is."""
    monkeypatch.setattr(sweep, "CHARACTERS", FEW)
    monkeypatch.setattr(sweep, "KINDS", ["a", "Z", "1", "'", "'s", "'d", " ", "  ", "\n", ".", "ſ", "é", "\u0301"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "chimera" / "engines"


def deepseek() -> dict[str, Any]:
    """Three Splits, as DeepSeek V3 has them."""
    numbers, kanji, words = (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        max(fastokens_engine.KNOWN - {*SPLITS.values()}, key=len),
    )
    steps = [split_then_bytes(regex)["pretokenizers"] for regex in (numbers, kanji, words)]
    return {"type": "Sequence", "pretokenizers": [steps[0][0], steps[1][0], *steps[2]]}


WIDER = {
    "byte level": with_added(*ADDED),
    "one word begins another": with_added("dare", "darei", "da", "are"),
    "ids out of the order of merges": swapped_ids(),
    "a token out of reach": merges_with(("x", "y"), ("y", "q"), ("x", "yq")),
    "every split merged, and whole tokens taken": every_split(ignore_merges=True),
    "split as in Llama 3": {**with_added(*ADDED), "pre_tokenizer": split_then_bytes(SPLITS["Llama 3"])},
    "NFC, as in Qwen": changed(pre_tokenizer=split_then_bytes(SPLITS["Qwen 2"]), normalizer={"type": "NFC"}),
    "three splits, as in DeepSeek": changed(pre_tokenizer=deepseek()),
    "a split that leaves gaps": changed(pre_tokenizer=split_then_bytes(r"\d|[aeiou ]{2,}")),
}


def same_ids(json_spec: dict[str, Any], examples: int) -> None:
    enc, oracle = encoder(json_spec), reference(json_spec)
    assert enc.path == "fastokens", enc.reason

    @settings(max_examples=examples)
    @given(texts | st.text("xyqz ", max_size=12) | st.lists(st.sampled_from(["da", "re", "i", " "])).map("".join))
    def check(text: str) -> None:
        assert ids_of(enc, text) == oracle.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize("name", WIDER)
def test_fastokens_gives_the_ids_of_tokenizers(name: str) -> None:
    same_ids(WIDER[name], 100)


@pytest.mark.chaos
@pytest.mark.parametrize("name", [*WIDER, *(name for name in SPLITS if name != "o200k")])
def test_fastokens_gives_the_ids_of_tokenizers_in_a_long_campaign(name: str) -> None:
    """With the sweep of all characters."""
    same_ids(WIDER.get(name) or changed(pre_tokenizer=split_then_bytes(SPLITS[name])), 20_000)


@pytest.mark.chaos
def test_the_sweep_of_all_characters_refuses_what_is_cut_otherwise() -> None:
    """O200k's regex, as fastokens 0.3.5 reads it."""
    enc = encoder(changed(pre_tokenizer=split_then_bytes(SPLITS["o200k"])))
    assert enc.path == "tiktoken"
    assert "fastokens: it cuts text otherwise beside" in enc.reason


REFUSED = {
    "a word that is found apart": (with_added("dare", single_word=True), "single_word"),
    "a word that takes spaces": (with_added("dare", lstrip=True), "lstrip"),
    "a word inside a special token": (with_added("endoftext"), "overlaps"),
    "a word that goes on after one": (with_added("|>dopo"), "overlaps"),
    "a word in normalized text": (
        {**with_added("é", normalized=True), "normalizer": {"type": "NFC"}},
        "normalized text",
    ),
    "another normalizer": (changed(normalizer={"type": "NFKC"}), "the normalizer is NFKC"),
    "a prefix": (changed(pre_tokenizer=byte_level(add_prefix_space=True)), "without a prefix space"),
    "a regex of its own": (changed(pre_tokenizer=split_then_bytes(r"\w+|[^\w\s]+|\s+")), "differently"),
    "bytes that are fallen back on": (
        changed(model={**json.loads(spec())["model"], "byte_fallback": True}),
        "byte_fallback",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fastokens_may_read_otherwise_is_not_given_to_it(name: str) -> None:
    json_spec, reason = REFUSED[name]
    enc = encoder(json_spec)
    assert enc.path != "fastokens"
    assert "fastokens: " in enc.reason
    assert reason in enc.reason.split("fastokens: ")[1]


@pytest.mark.usefixtures("few_characters")
def test_texts_with_a_character_that_is_read_otherwise_go_to_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """To one of them U+180E is white space."""
    monkeypatch.setattr(sweep, "CHARACTERS", (range(0x1800, 0x1820),))
    json_spec = changed(pre_tokenizer=split_then_bytes(SPLITS["GPT-2"]))
    enc, slow = encoder(json_spec), slow_encoder(json_spec)
    assert enc.path == "fastokens"
    assert "which gets texts with U+180E" in enc.reason
    batch = ["il gatto", ".\u180e\u180e x", "\n\u180e", "", "dorme"]
    for ours, theirs in zip(enc._encode_texts(batch), slow._encode_texts(batch), strict=True):
        assert np.array_equal(ours, theirs)


def test_an_engine_is_not_given_the_texts_that_it_is_unsure_of() -> None:
    slow, given = Tokenizers(reference(json.loads(spec()))), []

    def encode(batch: list[str]) -> sweep.Flat:
        given.extend(batch)
        return slow.encode_batch(batch)

    batch = ["casa", "a\u180e", "", "bſ"]
    ids, ends = Fastokens(encode, "\u180eſ", "", slow).encode_batch(batch)
    assert given == ["casa", ""]
    assert all(map(np.array_equal, (ids, ends), slow.encode_batch(batch)))


Make = Callable[[str], sweep.Encode]


def native(json_spec: str) -> sweep.Encode:
    return fastokens_engine.encoder_of(fastokens_engine.native_class(), json_spec)


def instead(**parts: Any) -> Make:
    """An engine that reads a tokenizer as if it had other `parts`."""
    return lambda json_spec: native(json.dumps({**json.loads(json_spec), **parts}))


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split_then_bytes(SPLITS["Llama 3"])},
        {"pre_tokenizer": split_then_bytes(SPLITS["GPT-2"].replace("|'d", ""))},
        {"pre_tokenizer": split_then_bytes(SPLITS["GPT-2"].replace(r"\s+(?!\S)|", ""))},
        {"normalizer": {"type": "NFC"}},
    ],
)
def test_an_engine_that_cuts_or_normalizes_otherwise_is_refused(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "CHARACTERS", (range(0x300, 0x400), range(0x1F00, 0x2000)))
    with pytest.raises(NotEquivalent, match="otherwise"):
        sweep.unsure_characters(json.loads(spec()), instead(**parts), "x")
    assert sweep.unsure_characters(json.loads(spec()), native, "y") == ""


@pytest.mark.usefixtures("few_characters")
def test_an_engine_of_other_merges_is_refused() -> None:
    model, loaded = json.loads(spec())["model"], reference(json.loads(spec()))
    plain = changed(added_tokens=[])
    other = {**model, "merges": [*model["merges"][1:], model["merges"][0]]}
    with pytest.raises(NotEquivalent, match="tokens of the vocabulary"):
        sweep.check_vocabulary(json.dumps(plain), instead(model=other)(json.dumps(plain)), "x", loaded, "")
    sweep.check_vocabulary(json.dumps(plain), native(json.dumps(plain)), "y", loaded, "")


def test_what_was_found_is_kept_a_refusal_too_and_found_again_where_it_is_damaged(few_characters: Path) -> None:
    def never(_: str) -> sweep.Encode:
        raise AssertionError("compared anew")

    plain, other = json.loads(spec()), instead(pre_tokenizer=split_then_bytes(SPLITS["Llama 3"]))
    assert sweep.unsure_characters(plain, native, "x") == sweep.unsure_characters(plain, never, "x") == ""
    with pytest.raises(AssertionError):
        sweep.unsure_characters(plain, never, "another version")
    (file,) = few_characters.iterdir()
    file.write_bytes(b"{")
    for make in (other, never):
        with pytest.raises(NotEquivalent, match="otherwise"):
            sweep.unsure_characters(plain, make, "x")


def test_without_a_place_to_keep_it_an_engine_is_compared_each_time(few_characters: Path) -> None:
    few_characters.parent.write_bytes(b"a file where the folder should be")
    assert encoder().path == "fastokens"


def without_fastokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "fastokens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastokens", None)


def test_without_the_package_the_next_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    without_fastokens(monkeypatch)
    enc = encoder()
    assert enc.path == "tiktoken"
    assert enc.reason == "same merges and pre-tokens; fastokens: not installed"
    enc = encoder(swapped_ids())
    assert enc.path == "tokenizers"
    assert enc.reason.startswith("fastokens: not installed; tiktoken: the id of ")


def test_another_version_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "fastokens-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastokens\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"version 9.9 is installed, {fastokens_engine.VERSION} is known" in encoder().reason


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_says_which_engine_is_tried_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    enc = encoder()
    assert enc.path == name
    assert ids_of(enc, "ciao, Il gatto dorme") == ids_of(slow_encoder(), "ciao, Il gatto dorme")


def test_an_unknown_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UserError, match="CHIMERA_ENCODER: 'fast' is none of fastokens, tiktoken, tokenizers"):
        encoder()


def test_a_sample_that_differs_goes_to_the_next_engine() -> None:
    enc = encoder()
    enc._engine = encoder(with_added("sedie"))._engine  # which finds a word that it should not
    enc.verify_sample(["Il gatto dorme."])
    assert enc.path == "fastokens"
    assert enc.reason.endswith("the same ids on a sample of 1 texts")
    enc.verify_sample(["con quattro sedie"])
    assert enc.path == "tiktoken"
    assert enc.reason.startswith("fastokens gave other ids on a sample of the source; same merges and pre-tokens; ")


def test_four_thousand_added_words_are_found_as_by_tokenizers() -> None:
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcdefghi", k=draw.randint(4, 9))) for _ in range(4000)})
    json_spec = with_added(*words)
    text = " ".join(draw.choices([*words, "Il gatto", "xyz", "abc"], k=3000)) + "".join(draw.choices(words, k=1000))
    enc = encoder(json_spec)
    assert enc.path == "fastokens", enc.reason
    assert ids_of(enc, text) == reference(json_spec).encode(text, add_special_tokens=False).ids


ENDLESS = [" " * 1_000_000 + "x", "a" * 100_000, "漢'" * 50_000, "1" * 100_000, "\n " * 100_000]


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize("pre", [byte_level(), split_then_bytes(SPLITS["Llama 3"]), split_then_bytes(SPLITS["GPT-2"])])
def test_texts_without_end_have_the_ids_of_tokenizers(pre: dict[str, Any]) -> None:
    enc = encoder(changed(pre_tokenizer=pre))
    assert enc.path == "fastokens"
    for text in ENDLESS:
        (ours,), (theirs,) = enc._encode_texts([text]), enc._encode_slowly([text])
        assert np.array_equal(ours, theirs)


def test_what_an_engine_gives_up_on_goes_to_tokenizers() -> None:
    slow, native_encode = Tokenizers(reference(json.loads(spec()))), native(json.dumps(changed(added_tokens=[])))

    def gives_up(given: list[str]) -> sweep.Flat:
        if any("gatto" in text for text in given):
            raise ValueError("match limit exceeded")
        return native_encode(given)

    batch = ["casa", "Il gatto dorme.", "", "tavolo"]
    ours, theirs = Fastokens(gives_up, "", "", slow).encode_batch(batch), slow.encode_batch(batch)
    assert all(map(np.array_equal, ours, theirs))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_worker_encodes_on_one_thread_and_keeps_its_cpus() -> None:
    before = os.sched_getaffinity(0)
    enc = encoder()
    [*enc._encode_texts([" ".join(AWKWARD) * 1000] * 20)]
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not [name for name in names if name.startswith("fastokens")]
    assert os.sched_getaffinity(0) == before
