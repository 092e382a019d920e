"""What `settings.model` stands for: a `transformers` configuration, before any weight is made or read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chimera.cli import UserError
from chimera.text import one_line
from chimera.train.settings import TrainSettings
from chimera.train.step.rotary import check_reached, check_rope
from chimera.versions import OLD_ROPE, under_known_names, with_both_names, with_rope_of_5

# Which transformers may take as 0
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
VOCAB_MULTIPLE = 128  # matrix units want it


def configuration(settings: TrainSettings, vocab_size: int, eos_id: int, pad_id: int) -> Any:
    """The configuration of the model that `settings.model` describes.

    Args:
        vocab_size: ids the shards' tokenizer can produce (largest id + 1).

    Raises:
        UserError: the model type or a key is unknown, or a given vocabulary is too small.
    """
    options = dict(settings.model)
    pretrained = options.pop("pretrained", None)
    size = padded(vocab_size) if options.get("vocab_size") is None else options["vocab_size"]
    if type(size) is not int:
        raise UserError(f"setting `model.vocab_size` is {size!r}; it is a whole number")
    if size < vocab_size:
        raise UserError(
            f"setting `model.vocab_size` is {options['vocab_size']}, but the shards' tokenizer makes ids up to "
            f"{vocab_size - 1}: leave it out (it becomes {padded(vocab_size)}) or set it to at least {vocab_size}"
        )
    with sizes_of_transformers():
        found = _of_folder(pretrained, options) if pretrained else _new({**options, "vocab_size": size}, eos_id, pad_id)
    for key in SIZES:  # by the names that other ones stand for
        if isinstance(value := getattr(found, key, None), int) and value < 1:
            raise UserError(f"setting `model.{key}` is {value}; it must be at least 1")
    return found


def padded(vocab_size: int) -> int:
    """The size of a model's vocabulary for `vocab_size` ids: the next multiple of `VOCAB_MULTIPLE`."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@contextmanager
def sizes_of_transformers() -> Iterator[None]:
    """Turn what `transformers` raises for sizes that do not fit together into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # behind that of the validation in transformers 5
        if "scaled_dot_product_attention yet" in str(cause):
            raise UserError(
                f"setting `attn_implementation: sdpa`: a {str(cause).partition(' ')[0]} of the installed transformers "
                "has none: set `attn_implementation=eager`, or flex_attention on a GPU"
            ) from None
        raise UserError(f"setting `model`: {type(cause).__name__}: {one_line(cause)[:300]}") from None


def positions(config: Any) -> int | None:
    """Tokens that a sequence of the model may have; None where its configuration names no bound."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_tokens(largest_ids: Mapping[str, int], vocabulary: int) -> None:
    """Raise `UserError` if a stream, by the largest of its ids, holds one that the model has no embedding for."""
    for name, largest in largest_ids.items():
        if largest >= vocabulary:
            raise UserError(
                f"stream `{name}` holds token id {largest}, but the model's vocabulary has {vocabulary} entries: "
                "set `model.vocab_size` higher, or build the shards with the model's tokenizer"
            )


def make_empty(config: Any) -> None:
    """Raise `UserError` for sizes that no model of this configuration can have; no memory is taken."""
    with sizes_of_transformers(), torch.device("meta"):
        try:
            AutoModelForCausalLM.from_config(deepcopy(config))
        except ValueError:
            raise
        except Exception:
            pass


def _new(options: dict[str, Any], eos_id: int, pad_id: int) -> Any:
    """The configuration of a model of random weights; raises `UserError` for a key its type does not know."""
    model_type = options.pop("model_type", None)
    if model_type is None:
        raise UserError("setting `model` needs `model_type` (llama, ...) or `pretrained: FOLDER`")
    options = _known(model_type, options)
    config = AutoConfig.for_model(
        model_type,
        **{
            "bos_token_id": None,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id if pad_id >= 0 else None,
            **deepcopy(options),
            "return_dict": True,  # the logits are read by their name
        },
    )
    check_reached(model_type, options, config)
    return config


def _known(model_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` as the installed transformers names them; raises `UserError` for a key the model type does not know."""
    # null takes back what a `base` says; copied, since transformers 5 writes defaults into a `rope_scaling` given to it
    options = deepcopy({key: value for key, value in options.items() if value is not None})
    if "rope_parameters" in options and (twice := sorted(options.keys() & OLD_ROPE)):
        raise UserError(
            f"setting `model.rope_parameters` and `model.{twice[0]}` are two names of one thing: keep one, and set the "
            "other to null if it comes from a `base`"
        )
    known = set(AutoConfig.for_model(model_type).to_dict())
    check_rope(model_type, options)
    options = under_known_names(model_type, options, known)
    for key in sorted(options.keys() - known):
        # transformers 5 takes the old names, which are gone afterwards
        if key in OLD_ROPE and key not in AutoConfig.for_model(model_type, **deepcopy({key: options[key]})).to_dict():
            continue
        raise UserError(
            f"setting `model.{key}` is unknown to transformers' {model_type} configuration: correct it, or "
            "set it to null if it comes from a `base`"
        )
    return options


def _of_folder(folder: str, options: dict[str, Any]) -> Any:
    """The configuration in `folder`, which `options` may change as `_changes` says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = with_rope_of_5(config)
    for key, value in _changes(folder, config.to_dict(), options).items():
        setattr(config, key, value)
    return config


def _changes(pretrained: str, there: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What `options` may change in a model folder's configuration: dropout.

    Raises `UserError` for anything else the folder does not say itself: with other heads, say, its weights may still
    fit, and mean nothing.
    """
    config = with_both_names(there)
    given = {key: value for key, value in options.items() if value is not None}
    changes = {key: value for key, value in given.items() if key.endswith("dropout") and key in config}
    other = [key for key in sorted(given.keys() - changes) if key not in config or config[key] != given[key]]
    if other:
        shown = ", ".join(f"{key} ({given[key]!r} here, {config.get(key)!r} there)" for key in other)
        raise UserError(
            f"setting `model` differs from what {pretrained} says of itself: {shown}: leave these out, or set them to "
            "null where they come from a `base`"
        )
    return changes
