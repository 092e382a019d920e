"""The libraries this project runs on: which versions, and where they differ.

Composer and streaming have had no release since July 2025, and pin torch 2.7.0, numpy below 2.2 and transformers below
5. They run on newer ones, which `overrides.txt` lets in. What the older and the newer stack do differently stands here.
"""

import importlib
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from chimera.cli import UserError, say

EXACT = {"mosaicml-streaming": "0.13.0", "mosaicml": "0.32.1"}
# The first version that is supported and the first that is not; the whole test suite ran on the versions after them.
SUPPORTED = {
    "torch": ("2.7", "2.16", ("2.7.0", "2.15.0")),
    "transformers": ("4.53", "6", ("4.53.3", "5.24.0")),
}


def install(extra: str) -> str:
    """The command that adds one of the project's extras to an installation of any stack, from a wheel or a checkout."""
    wanted = f'extra == "{extra}"'
    entries = [entry.partition("; ") for entry in requires("chimera-mix") or []]
    return f"`pip install {shlex.join(package for package, _, when in entries if when == wanted)}`"


def check_versions() -> None:
    """Raise `UserError` unless the libraries are of versions that are supported; name those that no test ran on.

    By name: with a numpy too new for streaming's pin, some installers take streaming 0.10 without a word.
    """
    for package, wanted in EXACT.items():
        if (found := _version(package)) != wanted:
            raise UserError(f"{package} {wanted} is needed, found {found or 'none'}: `pip install {package}=={wanted}`")
    for package, (first, end, _) in SUPPORTED.items():
        found = _version(package)
        if not _numbers(first) <= _numbers(found) < _numbers(end):
            raise UserError(
                f"{package} from {first} to below {end} is supported, found {found or 'none'}: "
                f"`pip install '{package}>={first},<{end}'`"
            )


def say_unproven() -> None:
    """One line for each library whose version is supported, but not one that the test suite ran on."""
    for package, (_, _, proven) in SUPPORTED.items():
        found = _version(package).partition("+")[0]
        if _numbers(found)[:2] not in [_numbers(tested)[:2] for tested in proven]:
            say(f"{package} {found}: supported, but the tests ran on {' and '.join(proven)} alone")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def complete_composer() -> None:
    """Give Composer the function its search for a microbatch (`auto`, with FSDP) needs on torch above 2.7.0.

    `composer/trainer/_patch_pytorch.py` (0.32.1) defines `unshard_with_sync` for torch 2.6.0 to 2.7.0 alone and calls
    it on any. What it replaces, `FlatParamHandle.unshard`, is the same text in torch 2.7.0 and 2.15.
    """
    import torch
    from composer.trainer import _patch_pytorch

    if hasattr(_patch_pytorch, "unshard_with_sync"):
        return
    found = torch.__version__
    torch.__version__ = type(found)("2.7.0")
    try:
        importlib.reload(_patch_pytorch)
    finally:
        torch.__version__ = found


def without_retries_of_the_hubs_client() -> None:
    """Have each request of `huggingface_hub` tried once, in silence, in this process.

    Version 1 and later try again by themselves (429 and 5xx, five times), beneath the caller's own attempts.
    """
    from huggingface_hub.utils import http_backoff, logging

    http_backoff.__kwdefaults__ = {**(http_backoff.__kwdefaults__ or {}), "max_retries": 0}
    logging.set_verbosity_error()


def cast_before_flex_attention() -> None:
    """Have flex attention take queries and keys of another dtype than the values, as `sdpa` does under autocast.

    There the rotation makes float32 of them where the values are bfloat16; torch refuses that, and transformers 4 does
    not cast for it.
    """
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("flex_attention", forward)


def dtype_keyword() -> str:
    """What `from_pretrained` and `from_config` call the type of the weights."""
    return "dtype" if _numbers(_version("transformers")) >= (4, 56) else "torch_dtype"


# How transformers 4 names what transformers 5 keeps in `rope_parameters`, where it is not `rope_theta` and so on.
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
OLD_NAMES = {"gpt_neox": _GPT_NEOX, "gpt_neox_japanese": _GPT_NEOX}
# Types whose layers differ in `rope_parameters`, with what transformers 4 calls the theta of the sliding ones.
BY_LAYER = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": None}
OLD_ROPE = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", *_GPT_NEOX.values()}


def with_both_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration (a dict as `to_dict` gives it) that transformers 4 and 5 read alike.

    The rotary frequencies are `rope_parameters` to 5, to 4 `rope_theta`, `rope_scaling` and others: a reader of the one
    takes a theta of 10000 without a word where it finds only the other. Likewise `dtype` and `torch_dtype`.
    """
    both = dict(config)
    model_type = str(config.get("model_type"))
    if isinstance(both.get("rope_parameters"), Mapping):
        both.update(_old_rope(model_type, both))
    elif (rope := _new_rope(model_type, both)) is not None:
        both["rope_parameters"] = rope
    for name, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if both.get(name) is not None:
            both[other] = both[name]
    return both


def under_known_names(model_type: str, options: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """`options` of a model's configuration with `rope_parameters` and `dtype` named as in `known`, where they have one.

    transformers 5 takes the names of 4 itself.
    """
    named = dict(options)
    for name, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if name in named and name not in known and other in known:
            named[other] = named.pop(name)
    if "rope_parameters" in named and "rope_parameters" not in known:
        old = {key: value for key, value in _old_rope(model_type, named).items() if value is not None}
        if old and old.keys() <= known:
            del named["rope_parameters"]
            named.update(old)
    elif isinstance(named.get("rope_scaling"), Mapping) and "rope_parameters" not in known:
        named["rope_scaling"] = _for_transformers_4(named, named["rope_scaling"])
    return named


def with_rope_of_5(config: Any) -> Any:
    """A configuration object read from a folder that transformers 5 wrote, with the rotation as 4 names it, under 4."""
    if _numbers(_version("transformers")) < (5,) and getattr(config, "rope_parameters", None):
        for key, value in _old_rope(config.model_type, config.to_dict()).items():
            setattr(config, key, value)
    return config


def _old_rope(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` under the names of transformers 4; those it has no names for are left out."""
    rope = config["rope_parameters"]
    if rope and not any(isinstance(value, Mapping) for value in rope.values()):
        return _old_flat(model_type, config, rope)
    if model_type not in BY_LAYER or not rope.get("full_attention"):
        return {}
    old = _old_flat(model_type, config, rope["full_attention"])
    if (name := BY_LAYER[model_type]) and (sliding := rope.get("sliding_attention")):
        old[name] = sliding.get("rope_theta")
    return old


def _old_flat(model_type: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    names = OLD_NAMES.get(model_type, {})
    old = {names.get(key, key): rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    default = scaling.get("rope_type", "default") == "default"
    return {**old, "rope_scaling": None if default else _for_transformers_4(config, scaling)}


def _for_transformers_4(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` without YaRN's original length where it is the model's own, of which 4 makes a factor of 1."""
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") != "yarn" or original is None or original != config.get("max_position_embeddings"):
        return dict(scaling)
    return {key: value for key, value in scaling.items() if key != "original_max_position_embeddings"}


def _new_rope(model_type: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The names of transformers 4 as `rope_parameters`; None where there are none."""
    names = OLD_NAMES.get(model_type, {})
    rope = {key: config.get(names.get(key, key)) for key in ("rope_theta", "partial_rotary_factor")}
    if rope["rope_theta"] is None:
        return None
    scaling = dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
    rope = {key: value for key, value in rope.items() if value is not None} | scaling
    if config.get("rope_local_base_freq") is None:
        return rope
    sliding = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    return {"full_attention": rope, "sliding_attention": sliding}
