"""Rotary settings reach the model as they are given, or are refused; a checkpoint knows what it was trained with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from chimera.cli import UserError
from chimera.commands import export_hf
from chimera.commands.train import main
from chimera.train.settings import TrainSettings
from chimera.train.step.model import CausalLM, build_model
from chimera.train.step.rotary import frequencies, same_frequencies
from tests.train.conftest import weights_of

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FROM_5 = int(transformers.__version__.split(".")[0]) >= 5


def built(model_type: str = "llama", **options: Any) -> CausalLM:
    model = {"model_type": model_type, **SIZES, "max_position_embeddings": 128, **options}
    return build_model(TrainSettings(model=model), 100, eos_id=0, pad_id=1)


def frequencies_of(model_type: str = "llama", **options: Any) -> list[list[float]]:
    return frequencies(built(model_type, **options).model)


def plain(theta: float, divided_by: float = 1.0) -> list[float]:
    """Of heads of eight: the scale, then four frequencies."""
    return [1.0, *(theta ** (-i / 4) / divided_by for i in range(4))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rope_theta": 5e5}, [plain(5e5)]),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, [plain(5e5)]),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, [plain(5e5, 4)]),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, [plain(5e5, 4)]),
        ({"rope_parameters": {"rope_theta": 5e5, "type": "linear", "factor": 4.0}}, [plain(5e5, 4)]),
    ],
)
def test_what_is_given_reaches_the_model(options: dict[str, Any], expected: list[list[float]]) -> None:
    assert same_frequencies(frequencies_of(**options), expected)


def test_yarn_of_the_models_own_length_scales_in_every_version() -> None:
    """transformers 4 by itself would take a factor of 1 from it."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    (found,) = frequencies_of(rope_theta=5e5, rope_scaling=yarn)
    assert found[0] == pytest.approx(1.1386, rel=1e-4)  # 0.1 · ln 4 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_parameters": {"theta": 5e5}}, r"`model.rope_parameters.theta` is unknown; known are"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "llama models take one mapping for all layers"),
        ({"rope_parameters": 3}, "`model.rope_parameters` is 3; it is a mapping"),
        ({"rope_parameters": []}, r"`model.rope_parameters` is \[\]; it is a mapping"),
        ({"rope_scaling": {"rope_type:yarn": None}}, "`model.rope_scaling.rope_type:yarn` is unknown"),
        ({"rope_scaling": {"factor": 4.0}}, "`model.rope_scaling.rope_type` is None; one of"),
        ({"rope_scaling": {"rope_typ": "linear", "factor": 4}}, "`model.rope_scaling.rope_typ` is unknown"),
        ({"rope_scaling": {}}, "`model.rope_scaling` is {}; it is a mapping"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}}, "give it as `model.rope_theta`"),
        ({"rope_scaling": {"rope_type": "nonsense"}}, "`model.rope_scaling.rope_type` is 'nonsense'; one of"),
        ({"rope_theta": "abc"}, "`model.rope_theta` is 'abc'; it is a number above 0"),
        ({"rope_theta": 0}, "`model.rope_theta` is 0; it is a number above 0"),
        ({"rope_theta": True}, "`model.rope_theta` is True; it is a number above 0"),
        ({"partial_rotary_factor": 0.5}, r"`model.partial_rotary_factor` is unknown|makes .* of the rotary settings"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "`model.rope_parameters.partial_rotary_factor` is unknown",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}},
            "factor 8.0 is not max_position_embeddings 128 / original_max_position_embeddings 32",
        ),
        ({"model_type": "gpt_neox", "rope_theta": 5e5}, "`model.rope_theta` is called `rotary_emb_base` by gpt_neox"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5e5}},
            "gemma3_text models take full_attention and sliding_attention, each a mapping",
        ),
    ],
)
def test_what_would_not_reach_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**options)


def test_a_folder_of_transformers_5_keeps_its_rotation(tmp_path: Path) -> None:
    """Its config.json may hold `rope_parameters` alone, which transformers 4 by itself passes over."""
    import json

    model = built(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 4.0})
    model.model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    file.write_text(json.dumps(config))
    options = {"pretrained": str(tmp_path), "rope_theta": 5e5}
    again = build_model(TrainSettings(model=options), 100, eos_id=0, pad_id=1)
    assert same_frequencies(frequencies(again.model), [plain(5e5, 4)])


def test_another_rotation_of_the_same_weights_is_no_resume(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn = "model.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32%s}"
    main(overrides("run", yarn % "", "max_duration=2ba"))
    for change in (", attention_factor: 3.0", ", beta_fast: 16.0"):
        with pytest.raises(UserError, match=r"rope_scaling is .*, the checkpoint|the rotary frequencies are not those"):
            main(overrides("run", yarn % change, "max_duration=3ba"))
    # a version of transformers that reads the same words otherwise
    monkeypatch.setattr("chimera.train.run.callbacks.frequencies", lambda _: [[1.0, 0.5]])
    with pytest.raises(UserError, match=r"the rotary frequencies are not those that the checkpoint \(step 2\)"):
        main(overrides("run", yarn % "", "max_duration=3ba"))
    monkeypatch.setattr("chimera.train.step.rotary.frequencies", lambda _: [[1.0, 0.5]])
    with pytest.raises(UserError, match="makes other rotary frequencies of its configuration than it was trained with"):
        export_hf.main([f"{tmp_path}/run/latest-rank0.pt", f"{tmp_path}/out"])
    assert weights_of(tmp_path / "run", 2)
