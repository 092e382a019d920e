"""Which versions of the libraries are taken, and that what they name otherwise means the same in each."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from composer.trainer import _patch_pytorch
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chimera import versions
from chimera.cli import UserError
from chimera.train.settings import TrainSettings
from chimera.train.step.model import build_model
from chimera.versions import check_versions, complete_composer, say_unproven, with_both_names


@pytest.mark.parametrize(
    ("package", "found", "message"),
    [
        (
            "mosaicml-streaming",
            "0.10.0",
            r"needed, found 0.10.0: `pip install mosaicml-streaming==0.13.0`",
        ),
        ("mosaicml", "", "mosaicml 0.32.1 is needed, found none"),
        ("torch", "2.6.0+cu124", r"torch from 2.7 to below 2.16 is supported, found 2.6.0\+cu124"),
        ("torch", "2.16.0", r"torch from 2.7 to below 2.16 is supported, found 2.16.0"),
        ("transformers", "4.52.4", "transformers from 4.53 to below 6 is supported, found 4.52.4"),
        ("transformers", "6.0.0", "transformers from 4.53 to below 6 is supported, found 6.0.0"),
    ],
)
def test_a_version_outside_of_the_range_is_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str, message: str
) -> None:
    installed = versions._version
    monkeypatch.setattr(versions, "_version", lambda name: found if name == package else installed(name))
    with pytest.raises(UserError, match=message):
        check_versions()


def test_a_version_between_those_tested_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_versions()
    say_unproven()
    assert not capsys.readouterr().err, "the suite runs on versions that are said to be tested"
    monkeypatch.setattr(versions, "_version", {"torch": "2.11.0+cu130", "transformers": "5.24.1"}.__getitem__)
    say_unproven()
    assert capsys.readouterr().err == "torch 2.11.0: supported, but the tests ran on 2.7.0 and 2.15.0 alone\n"


def test_composers_function_for_a_microbatch_found_under_fsdp_is_there() -> None:
    complete_composer()
    before, found = FlatParamHandle.unshard, torch.__version__
    _patch_pytorch.patch_unshard_for_automicrobatching(auto_microbatch_size_found=False)
    try:
        assert FlatParamHandle.unshard is _patch_pytorch.unshard_with_sync
        names = _patch_pytorch.unshard_with_sync.__code__.co_names
        private = [name for name in names if name.startswith("_") or name == "needs_unshard"]
        assert len(private) > 4
        assert all(hasattr(FlatParamHandle, name) for name in private)
    finally:
        _patch_pytorch.patch_unshard_for_automicrobatching(auto_microbatch_size_found=True)
    assert FlatParamHandle.unshard is before
    assert torch.__version__ == found


OLD_AND_NEW = [
    (
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None},
        {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
    (
        {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ),
    (
        {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4},
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
    (
        {"model_type": "gpt_neox", "rotary_emb_base": 1e4, "rotary_pct": 0.5, "rope_scaling": None},
        {
            "model_type": "gpt_neox",
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        },
    ),
    ({"model_type": "gpt2", "torch_dtype": "float32"}, {"model_type": "gpt2", "dtype": "float32"}),
]


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_either_name_gives_both(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert with_both_names(old) == with_both_names(new) == {**old, **new}


@pytest.mark.parametrize("type_", ["su", "yarn"])
def test_old_scalings_types_are_renamed(type_: str) -> None:
    old = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": type_, "factor": 2.0}}
    assert with_both_names(old)["rope_parameters"] == {"rope_theta": 1e4, "rope_type": type_, "factor": 2.0}


def test_yarns_original_length_is_left_to_older_readers_where_it_is_the_models_own() -> None:
    """transformers 4 would take a factor of 1 from it."""
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    found = with_both_names({"model_type": "llama", "max_position_embeddings": 2048, "rope_parameters": rope})
    assert found["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    found = with_both_names({"model_type": "llama", "max_position_embeddings": 8192, "rope_parameters": rope})
    assert found["rope_scaling"]["original_max_position_embeddings"] == 2048


def test_both_names_change_no_configuration() -> None:
    """Of any type of causal model that reads its own configuration again."""

    def read(config: dict[str, Any]) -> dict[str, Any]:
        found = AutoConfig.for_model(**deepcopy(config)).to_dict()
        return {key: found[key] for key in keys}

    compared = 0
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = {**AutoConfig.for_model(model_type).to_dict(), "model_type": model_type}
            keys = set(config)
            same = read(config) == config
        except Exception:  # types that need to be told their parts, or are named otherwise; each of an error of its own
            continue
        if same:
            assert read(with_both_names(config)) == config
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("name", ["rope_theta", "rope_parameters"])
def test_a_setting_under_either_name_reaches_the_model(name: str) -> None:
    def frequencies(**rope: Any) -> torch.Tensor:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        settings = TrainSettings(model={"model_type": "llama", **sizes, **rope})
        return build_model(settings, 100, eos_id=0, pad_id=1).model.model.rotary_emb.inv_freq

    scaling = {"rope_type": "linear", "factor": 2.0}
    rope = {"rope_theta": 5e5, "rope_scaling": scaling} if name == "rope_theta" else None
    found = frequencies(**(rope or {"rope_parameters": {"rope_theta": 5e5, **scaling}}))
    assert torch.allclose(found, 1 / 5e5 ** (torch.arange(0, 8, 2) / 8) / 2)
    assert scaling == {"rope_type": "linear", "factor": 2.0}, "what the user gave is not written to"


def test_two_names_of_one_thing_are_refused() -> None:
    options = {"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}
    with pytest.raises(UserError, match=r"`model.rope_parameters` and `model.rope_theta` are two names"):
        build_model(TrainSettings(model=options), 100, eos_id=0, pad_id=1)
