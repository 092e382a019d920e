"""Rotary position embeddings: what settings may say of them, and the frequencies a model really has.

`transformers` takes most mistakes in these settings without a word and trains with its defaults, and its versions 4 and
5 read some of them otherwise. So what is given is checked by name and looked for in the configuration that comes out,
and the model's own frequencies are kept in each checkpoint, to be compared on resume and export.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chimera.cli import UserError
from chimera.versions import BY_LAYER, OLD_NAMES, with_both_names

_LISTS = {"short_factor", "long_factor", "mrope_section"}
_NUMBERS = {"rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor"}
_NUMBERS |= {"beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"}
_KEYS = {"rope_type", "truncate", *_NUMBERS, *_LISTS}
_BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "partial_rotary_factor", "rotary_pct")
Frequencies = list[list[float]]  # of each kind of layer: the scale of its attention, then the frequencies


def check_rope(model_type: str, options: dict[str, Any]) -> None:
    """Raise `UserError` for rotary settings that a model of this type would not have as they are given.

    An old `type` becomes `rope_type` in place.
    """
    default = AutoConfig.for_model(model_type).to_dict()
    for key in (key for key in _BASES if key in options):
        _check_number(f"model.{key}", options[key])
        if other := OLD_NAMES.get(model_type, {}).get(key):
            raise UserError(f"setting `model.{key}` is called `{other}` by {model_type} models: use that name")
    partial = "partial_rotary_factor" in {**default, **_flat(default.get("rope_parameters"))}
    if "partial_rotary_factor" in options and not partial:
        raise UserError(f"setting `model.partial_rotary_factor` is unknown to {model_type} models: leave it out")
    layers = _layers(model_type, default)
    for key in (key for key in ("rope_parameters", "rope_scaling") if key in options):
        given = options[key]
        if not isinstance(given, dict) or not given:
            raise UserError(f"setting `model.{key}` is {given!r}; it is a mapping: {{rope_type: linear, factor: 2}}")
        nested = any(isinstance(value, Mapping) for value in given.values())
        if key == "rope_parameters" and (nested or layers) and set(given) != set(layers):
            wanted = f"{' and '.join(sorted(layers))}, each a mapping" if layers else "one mapping for all layers"
            raise UserError(f"setting `model.rope_parameters`: {model_type} models take {wanted}")
        for name, rope in given.items() if nested else [("", given)]:
            where = f"model.{key}.{name}".rstrip(".")
            _check_one(where, rope, key, partial)
            _check_yarn(where, rope, options.get("max_position_embeddings", default.get("max_position_embeddings")))


def check_reached(model_type: str, options: Mapping[str, Any], config: Any) -> None:
    """Raise `UserError` unless the configuration `config` says of rotation what `options` ask for."""
    wanted = options.get("rope_parameters")
    if wanted is None:
        names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
        names |= OLD_NAMES.get(model_type, {})
        wanted = {**options.get("rope_scaling", {})} | {
            k: options[name] for k, name in names.items() if name in options
        }
    held = with_both_names(config.to_dict()).get("rope_parameters") or {}
    if "full_attention" in held and "full_attention" not in wanted:
        held = held["full_attention"]
    if not _holds(held, wanted):
        raise UserError(
            f"setting `model`: transformers' {model_type} configuration makes {dict(held)} of the rotary settings "
            f"{dict(wanted)}: correct them, or leave them out"
        )


def frequencies(model: PreTrainedModel) -> Frequencies:
    """The rotary frequencies that `model` has, each kind of layer once; empty without any."""
    found = set()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                own = getattr(module, name.replace("inv_freq", "attention_scaling"), None)
                scale = getattr(module, "attention_scaling", 1.0) if own is None else own
                found.add((float(scale), *(float(f"{value:.6g}") for value in buffer.flatten().tolist())))
    return sorted(map(list, found))


def same_frequencies(one: Sequence[Sequence[float]], two: Sequence[Sequence[float]]) -> bool:
    """Whether two sets agree to float32's rounding; transformers 4 also keeps those of layer types the model lacks."""
    few, many = sorted((one, two), key=len)
    return bool(few) == bool(many) and all(any(_close(a, b) for b in many) for a in few)


def _close(one: Sequence[float], two: Sequence[float]) -> bool:
    return len(one) == len(two) and all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(one, two, strict=True))


def _layers(model_type: str, default: Mapping[str, Any]) -> set[str]:
    """The kinds of layers that have `rope_parameters` of their own; empty where all share them."""
    if model_type in BY_LAYER:
        return {"full_attention", "sliding_attention"}
    rope = default.get("rope_parameters") or {}
    return {name for name, value in rope.items() if isinstance(value, Mapping)}


def _flat(rope: Any) -> Mapping[str, Any]:
    return rope if isinstance(rope, Mapping) else {}


def _check_one(where: str, rope: dict[str, Any], key: str, partial: bool) -> None:
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    for name in rope:
        if name not in _KEYS or (name == "partial_rotary_factor" and not partial):
            raise UserError(f"setting `{where}.{name}` is unknown; known are {', '.join(sorted(_KEYS))}")
        if name in _NUMBERS:
            _check_number(f"{where}.{name}", rope[name])
        if name in _LISTS and not isinstance(rope[name], list):
            raise UserError(f"setting `{where}.{name}` is {rope[name]!r}; it is a list of numbers")
    if key == "rope_scaling" and "rope_theta" in rope:
        raise UserError(f"setting `{where}.rope_theta`: give it as `model.rope_theta`")
    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    if rope.get("rope_type", "default" if key == "rope_parameters" else None) not in kinds:
        raise UserError(f"setting `{where}.rope_type` is {rope.get('rope_type')!r}; one of {', '.join(sorted(kinds))}")


def _check_number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"setting `{where}` is {value!r}; it is a number above 0")


def _check_yarn(where: str, rope: Mapping[str, Any], longest: Any) -> None:
    """transformers 4 passes over YaRN's `factor` where an original length is given, 5 does not: they must agree."""
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type") != "yarn" or not (factor and original and longest) or original == longest:
        return
    if not math.isclose(factor, longest / original):
        raise UserError(
            f"setting `{where}`: factor {factor} is not max_position_embeddings {longest} / "
            f"original_max_position_embeddings {original}: versions of transformers take one or the other: make them "
            "agree"
        )


def _holds(held: Any, wanted: Any) -> bool:
    if not isinstance(wanted, Mapping):
        return bool(held == wanted)
    return isinstance(held, Mapping) and all(_holds(held.get(key), value) for key, value in wanted.items())
