"""A small real tokenizer for tests: byte-level BPE trained in a moment, with ChatML tokens and added words."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.texts import chunks

EOS, PAD, START, END = "<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"
ADDED = ("ciao", "perche", "andare", "dare")
REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

_TEXT = """
Il gatto dorme sotto l'albero e la pioggia cade piano sui tetti della città; perché no? It's what we've seen:
they'll run 1234 miles, don't they? Nel mezzo del campo c'era una casa bianca, e dentro la casa un tavolo con
quattro sedie. The water rises into the air as vapour, cools, and falls again. 12 x 12 = 144; 3.1415 ... !!!
\tfor i in range(10):\n\t\tprint(i)\n\n\n    return  None\n  Die Straße über den Fluss — «così», disse.
Ελλάδα. 漢字かな.
"""


@cache
def spec() -> str:
    """The `tokenizer.json` as text, without added words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (EOS, PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return str(tokenizer.to_str())


def changed(**parts: Any) -> dict[str, Any]:
    """The tokenizer's JSON with whole top-level parts replaced."""
    return {**json.loads(spec()), **parts}


def with_added(*words: str, **flags: bool) -> dict[str, Any]:
    """The tokenizer's JSON with added tokens that are not special."""
    found = json.loads(spec())
    first = max(found["model"]["vocab"].values()) + 1
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    found["added_tokens"] += [{**usual, **flags, "id": first + i, "content": w} for i, w in enumerate(words)]
    return found


def encoder(json_spec: dict[str, Any] | None = None) -> Encoder:
    raw = json.dumps(with_added(*ADDED) if json_spec is None else json_spec).encode()
    return Encoder(raw, EOS, PAD, "test tokenizer")


def slow_encoder(json_spec: dict[str, Any] | None = None) -> Encoder:
    """The same on the path through `tokenizers`."""
    found = encoder(json_spec)
    found.leave_fast_path("for the test")
    return found


def ids_of(enc: Encoder, text: str) -> list[int]:
    """The ids of one text without the EOS that must end them."""
    ((ids, mask),) = enc.encode([Document(tuple(chunks(text.encode())))])
    assert mask is None
    assert ids[-1] == enc.eos_id
    return list(ids[:-1].tolist())
