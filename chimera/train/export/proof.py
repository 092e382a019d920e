"""Is an export what was trained? The folder is loaded as a user would, and what differs is one line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from transformers.utils.chat_template_utils import _compile_jinja_template

from chimera.cli import UserError
from chimera.mds import Json
from chimera.text import one_line
from chimera.tokenizer_file import load
from chimera.train.export.trained import Trained, trained_ends
from chimera.train.step.configuration import positions
from chimera.versions import dtype_keyword

# Besides samples of the shards: languages, digits, white space, what normalizers change.
TEXTS = (
    "The water rises into the air as vapour, cools, and falls again.",
    "Perché il cielo è blu? L'acqua bolle a 100 gradi.",
    "  def f(x):\n\t\treturn x ** 2  # 12345\n\n\n",
    "Straße Ωmega 漢字かな \u00e9 e\u0301 \ufb01 \U0001f600",
)


def prove(model: Any, folder: Path, about: Mapping[str, Any], trained: Trained, longest: int) -> Any:
    """Raise `UserError` unless the export in `folder` gives a user what the checkpoint was trained to.

    Returns its tokenizer.

    Args:
        model: with the checkpoint's weights.
        about: what the checkpoint keeps of its run.
        trained: the template of the chats that the weights have seen.
        longest: tokens of the longest sequences it was trained on.
    """
    try:
        local = {"local_files_only": True, "trust_remote_code": False}  # unasked, it would ask on a terminal
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        options = {**local, "output_loading_info": True, dtype_keyword(): model.dtype}
        again, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # whatever a file of the base that this version cannot read raises
        raise _differs(f"it does not load: {type(error).__name__}: {one_line(error)[:300]}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loading.get(kind) or ())):
            raise _differs(f"its weights are not those of its configuration ({kind}: {names[0]} for one)")
    check_numbers(again.config, again.generation_config, tokenizer, longest)
    check_logits(model, again.eval())
    check_texts(tokenizer, about)
    if trained.template:
        check_template(tokenizer, trained)
        check_chats(tokenizer, trained, about.get("proofs", {}))
    ends = [tokenizer.convert_tokens_to_ids(end) for end in trained_ends(about, trained)]
    check_ends(again, ends)
    return tokenizer


def _differs(what: str) -> UserError:
    return UserError(f"nothing is exported: {what}")


def check_numbers(config: Any, generation: Any, tokenizer: Any, longest: int) -> None:
    """Raise `UserError` unless a configuration's numbers agree with the tokenizer and with what was trained."""
    bound = positions(config)
    if bound is not None and bound < longest:
        raise _differs(f"config.json names {bound} positions, sequences of {longest} tokens were trained on")
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise _differs(f"the tokenizer makes ids up to {largest}, config.json names {config.vocab_size} of them")
    for name, where in (("config.json", config), ("generation_config.json", generation)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(where, key, None)
            for number in found if isinstance(found, list) else [found]:
                if number is not None and number >= config.vocab_size:
                    raise _differs(f"{name} has `{key}` {number}, the vocabulary ends at {config.vocab_size - 1}")


def check_logits(model: Any, again: Any) -> None:
    """Raise `UserError` unless both models have the same logits on fixed ids."""
    ids = torch.arange(min(64, model.config.vocab_size, positions(model.config) or 64))[None]
    with torch.no_grad():
        if not torch.equal(model(ids).logits, again(ids).logits):
            raise _differs("the folder loads, but its logits differ from the checkpoint's")


def check_texts(tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the export's tokenizer, called as a user does, gives the ids that texts had in training.

    Samples of the shards are taken where the shards' own tokenizer gives their text the ids they have: not where text
    spells a special token, say, which it never becomes in training. A base may put its own tokens around a text.
    """
    trained = load(about["tokenizer"])
    samples = [(text, trained.encode(text, add_special_tokens=False).ids) for text in TEXTS]
    for ids in about.get("samples", ()):
        text = trained.decode(ids, skip_special_tokens=False)
        if trained.encode(text, add_special_tokens=False).ids == ids:
            samples.append((text, ids))
    bos = about.get("bos", [])
    for line in (line for lines in about.get("proofs", {}).values() for line in lines if "messages" not in line):
        ids = line["ids"][len(bos) : -1]
        if trained.encode(line["text"], add_special_tokens=False).ids == ids:
            samples.append((line["text"], ids))
    around = tokenizer("").input_ids if about.get("base") else bos
    if around[: len(bos)] != bos:
        raise _differs(f"its tokenizer puts {around} around a text, {bos} began each that was trained on")
    for text, ids in samples:
        found = tokenizer(text).input_ids
        begin = next((i for i in range(len(around) + 1) if found[i : i + len(ids)] == ids), None)
        if begin is None or sorted(found[:begin] + found[begin + len(ids) :]) != sorted(around):
            place = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), len(ids))
            raise _differs(
                f"its tokenizer gives {one_line(repr(text))[:60]} other ids than the shards have: "
                f"{found[place : place + 4]} at {place}, not {ids[place : place + 4]}"
            )


def check_template(tokenizer: Any, trained: Trained) -> None:
    """Raise `UserError` unless the template that a reader finds is, for what a model is asked, the trained one."""
    for text in ("Ciao?", "Water boils\nat 100 °C."):
        chat = [{"role": "user", "content": text}]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        here = tokenizer.apply_chat_template(chat, **options)
        there = tokenizer.apply_chat_template(chat, chat_template=trained.text, **trained.named, **options)
        if here != there:
            raise _differs(
                f"its chat template writes {one_line(repr(here))[:120]}, {one_line(repr(there))[:120]} was trained"
            )


def check_chats(tokenizer: Any, trained: Trained, proofs: Mapping[str, Sequence[Json]]) -> None:
    """Raise `UserError` unless samples of the shards' conversations are rendered to the text and the ids they have.

    Of the ids those of the first prompt: a server tokenizes a conversation that goes on whole, the shards cut it where
    each answer began. A base's template may put white space after what was trained.
    """
    for stream in trained.streams:
        for line in (line for line in proofs.get(stream, ()) if line["served"] and line["first"]):
            options: dict[str, Any] = {"tools": line["tools"] or None}
            with on_day(tokenizer, trained, options["tools"]):
                text = tokenizer.apply_chat_template(line["messages"], tokenize=False, **options)
                options |= {"add_generation_prompt": True, "return_dict": False}
                prompt = tokenizer.apply_chat_template(line["messages"][: line["first"]], **options)
            if text.rstrip() != line["text"].rstrip() or list(prompt) != line["ids"][: line["mask"].index(1)]:
                raise _differs(
                    f"a conversation of stream `{stream}` would be served as {one_line(repr(text))[:200]}, its shards "
                    f"have {one_line(repr(line['text']))[:200]}, or other ids for its prompt"
                )


@contextmanager
def on_day(tokenizer: Any, trained: Trained, tools: Any) -> Iterator[None]:
    """Have the template of a tokenizer write the day of the shards."""
    assert trained.template is not None
    if (date := trained.template.date) is None:
        yield
        return
    compiled = _compile_jinja_template(tokenizer.get_chat_template(None, tools)).environment.globals
    clock = compiled["strftime_now"]
    compiled["strftime_now"] = datetime.fromisoformat(date).strftime
    try:
        yield
    finally:
        compiled["strftime_now"] = clock


class _Says(LogitsProcessor):
    """Has a model say one token, whatever it would."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


def check_ends(model: Any, ends: Sequence[int]) -> None:
    """Raise `UserError` unless `generate`, as a user calls it, stops at each of `ends`."""
    ids = torch.tensor([[5, 6, 7]])
    for end in ends:
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 0}
        try:
            made = model.generate(ids, logits_processor=[_Says(end)], **options)
        except Exception as error:  # of many kinds, by what its configuration asks for
            why = f"{type(error).__name__}: {one_line(error)[:200]}"
            raise _differs(f"`generate` fails with its generation_config.json: {why}") from None
        if made.shape[1] != ids.shape[1] + 1:
            raise _differs(f"`generate` goes on after token {end}, which ends a text or a turn")
