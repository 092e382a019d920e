"""Mistral's `tekken.json` as a `tokenizer.json`, and how tiktoken's bare ranks are told and refused.

A `tekken.json` holds the regex that splits a text, the entries by rank, and the special tokens, whose ids come first.
As in Llama 3's file each entry gets a merge for every split of it; that this gives tiktoken's ids is seen on a sample
here, and proven where a build takes the fast path.
"""

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import tiktoken

from chimera.cli import UserError

_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a line of a `.tiktoken` file
_SAMPLE = (
    "It's what WE'VE seen: they'll run 12345.67 miles!  \n\n\tif x != y:\r\n    return  None",
    "Perché no?\u00a0Ελλάδα, Привет мир, 漢字かな交じり文, مرحبا, नमस्ते, e\u0301 👩\u200d👩\u200d👧 ①½ ǅ <s> [INST]   ",
)


def refuse_ranks(name: str, head: bytes) -> None:
    """Raise `UserError` for tiktoken's ranks; `head` is how the file begins, at least its first line."""
    if name.endswith(".tiktoken") or _RANKS.match(head):
        raise UserError(
            f"{name}: these are tiktoken's ranks, which say neither how a text is split nor which special tokens there "
            "are: give the tokenizer.json that their authors publish, or make one with their regex and special tokens: "
            "`TikTokenConverter(FILE, REGEX, False, SPECIAL_TOKENS).converted().save('tokenizer.json')`, of "
            "transformers.convert_slow_tokenizer"
        )


def tokenizer_json(name: str, data: bytes, load: Callable[[bytes], Any]) -> bytes:
    """The `tokenizer.json` of a `tekken.json`; a text begins with its `<s>`, as at inference by Mistral's library.

    `load` makes a tokenizer of it. Raises `UserError` for one of before special tokens stood in it, and where tiktoken
    would give other ids.
    """
    spec = json.loads(data)
    config, held = spec["config"], spec.get("special_tokens")
    if held is None:
        raise UserError(f"{name}: it does not hold its special tokens (of 2024): give the model's tokenizer.json")
    words = [token["token_str"] for token in sorted(held, key=lambda token: token["rank"])]
    first = config.get("default_num_special_tokens") or len(words)
    words += [f"<SPECIAL_{i}>" for i in range(len(words), first)]
    size = config.get("default_vocab_size") or first + len(spec["vocab"])
    entries = [base64.b64decode(token["token_bytes"]) for token in spec["vocab"][: size - first]]
    ranks = {entry: rank for rank, entry in enumerate(entries)}
    characters = _byte_characters()
    shown = {entry: entry.decode("latin-1").translate(characters) for entry in entries}
    vocab = {word: id_ for id_, word in enumerate(words)}
    vocab |= {shown[entry]: first + rank for entry, rank in ranks.items()}
    if len(vocab) != first + len(spec["vocab"][: size - first]) or len(words) != first:
        raise UserError(f"{name}: two of its tokens are the same: give the model's tokenizer.json")
    merges = [
        [shown[left], shown[right]]
        for entry in entries
        for left, right in sorted(
            ((entry[:at], entry[at:]) for at in range(1, len(entry)) if entry[:at] in ranks and entry[at:] in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )
    ]
    made = json.dumps(_spec(config["pattern"], words, vocab, merges), ensure_ascii=False).encode()
    ours = load(made)
    ours.encode_special_tokens = True
    theirs = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    for text in _SAMPLE:
        if ours.encode(text, add_special_tokens=False).ids != [first + rank for rank in theirs.encode_ordinary(text)]:
            raise UserError(f"{name}: converted, it gives a text other ids: give the model's tokenizer.json")
    return made


def _spec(pattern: str, words: list[str], vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    text, pair = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if "<s>" in words else []
    before = {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}} if bos else {}
    unused = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model = {"type": "BPE", **unused, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[word], "content": word, "special": True, **flags} for word in words],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*bos, text],
            "pair": [*bos, text, pair],
            "special_tokens": before,
        },
        "decoder": byte_level,
        "model": {**model, "vocab": vocab, "merges": merges},
    }


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
