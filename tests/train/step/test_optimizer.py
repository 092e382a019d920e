"""Which parameters decay and which Muon trains, and that a resumed run's optimizer is the uninterrupted one's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.optim import DecoupledAdamW
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chimera.cli import UserError
from chimera.commands.train import main
from chimera.train.run import callbacks
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.settings import OptimizerSettings, TrainSettings
from chimera.train.step import optimizer
from chimera.train.step.optimizer import build_optimizer, check_muon, parameter_kinds, set_group
from tests.train.conftest import steps_of
from tests.train.run.test_launches import finish, launch

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 32}
LLAMA_MATRICES = {
    *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}


def tiny(model_type: str = "llama", **options: Any) -> PreTrainedModel:
    """A model of one layer: 16 wide, 32 tokens."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32} if model_type == "gpt2" else SIZES
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **options))


def of_kind(model: PreTrainedModel, kind: str) -> set[str]:
    return {name for name, found in parameter_kinds(model).items() if found == kind}


@pytest.mark.parametrize(
    ("model", "matrices", "heads"),
    [
        (tiny(tie_word_embeddings=True), LLAMA_MATRICES, set()),
        (tiny(tie_word_embeddings=False), LLAMA_MATRICES, {"lm_head.weight"}),
        (tiny("qwen2", tie_word_embeddings=True), LLAMA_MATRICES, set()),
        (
            tiny("gpt2"),  # its head is tied, its positions are an embedding, its matrices are of transformers' Conv1D
            {f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
            set(),
        ),
    ],
    ids=["llama", "llama untied", "qwen2", "gpt2"],
)
def test_matrices_decay_and_biases_norms_and_embeddings_do_not(
    model: PreTrainedModel, matrices: set[str], heads: set[str]
) -> None:
    assert of_kind(model, "matrix") == matrices
    assert of_kind(model, "head") == heads
    for options in [OptimizerSettings(name=name) for name in ("adamw", "muon")]:
        if options.name == "muon" and not hasattr(torch.optim, "Muon"):
            continue
        groups = build_optimizer(model, TrainSettings(optimizer=options)).param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters()), "each in exactly one group"
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        assert decayed == matrices | heads


def test_what_has_two_dimensions_and_is_no_matrix_does_not_decay() -> None:
    cohere = tiny("cohere", use_qk_norm=True)  # gains [heads, width]
    gains = {name for name, parameter in cohere.named_parameters() if "norm" in name and parameter.ndim == 2}
    assert gains
    assert gains <= of_kind(cohere, "rest")

    model = tiny()
    model.model.experts = nn.ParameterDict(
        {"up": torch.zeros(2, 3, 4), "up_bias": torch.zeros(2, 3), "table": torch.zeros(2, 3)}
    )
    model.model.experts["table"]._no_weight_decay = True  # as Mamba marks its own
    assert {"model.experts.up_bias", "model.experts.table"} <= of_kind(model, "rest")
    assert of_kind(model, "head") == {"model.experts.up", "lm_head.weight"}


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=needs_muon)])
@pytest.mark.parametrize("on", ["matrices", "all"])
def test_a_decayed_weight_loses_the_same_share_under_both_optimizers(name: str, on: str) -> None:
    """Without a gradient, only the decay is left: at half the peak rate, half of `weight_decay`, whatever the peak."""
    model = tiny(tie_word_embeddings=False)
    nn.init.normal_(model.model.norm.weight)
    options = OptimizerSettings(name=name, lr=0.02, weight_decay=0.1, weight_decay_on=on)
    built = build_optimizer(model, TrainSettings(optimizer=options))
    for group in built.param_groups:
        set_group(group, options, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    kinds = parameter_kinds(model)
    for key, parameter in model.named_parameters():
        share = 0.05 if on == "all" or kinds[key] != "rest" else 0
        torch.testing.assert_close(parameter.detach(), before[key] * (1 - share))


@needs_muon
def test_muon_steps_matrices_as_by_hand_and_adamw_the_rest() -> None:
    model, twin = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=False)
    options = OptimizerSettings(name="muon", lr=0.02, weight_decay=0.1, weight_decay_on="matrices")
    built = build_optimizer(model, TrainSettings(optimizer=options))
    rest = [
        {"params": [p for n, p in twin.named_parameters() if parameter_kinds(twin)[n] == "head"], "weight_decay": 0.1},
        {"params": [p for n, p in twin.named_parameters() if parameter_kinds(twin)[n] == "rest"], "weight_decay": 0.0},
    ]
    adamw = DecoupledAdamW(rest, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    momenta = {name: torch.zeros_like(p) for name, p in twin.named_parameters() if name in LLAMA_MATRICES}
    for share in (0.25, 1.0, 1.0, 1.0):  # of the peak rate
        for group in built.param_groups:
            set_group(group, options, share)
        for group in adamw.param_groups:
            group["lr"] = share * 0.02
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        built.step()
        adamw.step()
        for name, momentum in momenta.items():
            parameter = twin.get_parameter(name)
            momentum.copy_(0.95 * momentum + 0.05 * parameter.grad)
            direction = orthogonal(0.05 * parameter.grad + 0.95 * momentum)
            with torch.no_grad():
                parameter *= 1 - share * 0.1
                parameter -= share * 0.02 * 0.2 * max(parameter.shape) ** 0.5 * direction
    start = tiny(tie_word_embeddings=False)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name in momenta:  # in bfloat16, directions round by some percent
            assert (ours - theirs).norm() < 0.08 * (ours - start.get_parameter(name)).norm(), name
        else:
            assert torch.equal(ours, theirs), name


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's Newton–Schulz iteration (Jordan et al., 2024), five times."""
    x = matrix.bfloat16() / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.float()


def test_muon_where_torch_has_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=rf"`optimizer.name: muon` needs torch 2.9 .* {torch.__version__[:3]}"):
        check_muon(TrainSettings(optimizer=OptimizerSettings(name="muon")))


def test_fsdp_of_flat_tensors_takes_one_group_only() -> None:
    flat: dict[str, Any] = {"parallelism": {"fsdp": {"use_orig_params": False}}}
    with pytest.raises(UserError, match=r"`parallelism.fsdp.use_orig_params: false` .*`optimizer.weight_decay_on=all`"):
        build_optimizer(tiny(), TrainSettings(**flat, optimizer=OptimizerSettings(weight_decay_on="matrices")))
    (group,) = build_optimizer(
        tiny(), TrainSettings(**flat, optimizer=OptimizerSettings(weight_decay_on="all"))
    ).param_groups
    assert group["weight_decay"] == 1e-5


QUICK = ["curriculum.stages=[{from_step: 0, seq_len: 32}]", "optimizer.weight_decay=0.1"]  # a decay that shows
Run = Callable[..., None]


@pytest.fixture
def train(overrides: Callable[..., list[str]]) -> Run:
    """Run `main` to step `until` in the folder NAME."""

    def run(name: str, until: int, *more: str) -> None:
        assert main(overrides(name, *QUICK, f"max_duration={until}ba", *more)) == 0

    return run


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, by name."""
    state = read_checkpoint(folder / f"ep0-ba{step}-rank0.pt")
    (moments,) = (each["state"] for each in state["optimizers"].values())
    return state["model"] | {f"{name} {key}": tensor for name, held in moments.items() for key, tensor in held.items()}


def decays_of(folder: Path, step: int) -> dict[str, float]:
    """The weight decay of each group of a checkpoint, and whatever it says of its optimizer."""
    state = read_checkpoint(folder / f"ep0-ba{step}-rank0.pt")
    (groups,) = (each["param_groups"] for each in state["optimizers"].values())
    return {group["kind"]: group["weight_decay"] for group in groups} | state["callbacks"]["About"]["about"][
        "optimizer"
    ]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer.weight_decay_on=matrices"],
        ["optimizer.weight_decay_on=all"],
        pytest.param(["optimizer.name=muon", "scheduler.decay=sqrt"], marks=needs_muon),
    ],
    ids=["matrices", "all", "muon"],
)
def test_a_run_stopped_in_the_middle_ends_as_the_uninterrupted_one(
    train: Run, tmp_path: Path, options: list[str]
) -> None:
    train("whole", 30, *options)
    for until in (7, 25, 30):
        train("parts", until, *options)
    assert_same(state_of(tmp_path / "parts", 30), state_of(tmp_path / "whole", 30))
    assert [line["loss"] for line in steps_of(tmp_path / "parts")] == [
        line["loss"] for line in steps_of(tmp_path / "whole")
    ]


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer and the checkpoints of before parameters were grouped."""

    def single(model: PreTrainedModel, settings: TrainSettings) -> DecoupledAdamW:
        options = settings.optimizer
        options.weight_decay_on = None
        betas = (options.betas[0], options.betas[1])
        return DecoupledAdamW(
            model.parameters(), lr=options.lr, betas=betas, eps=options.eps, weight_decay=options.weight_decay
        )

    def set_single(group: dict[str, Any], options: OptimizerSettings, share: float) -> None:
        group["lr"], group["initial_lr"] = share * options.lr, options.lr
        group["betas"], group["eps"] = tuple(options.betas), options.eps
        group["weight_decay"] = options.weight_decay

    monkeypatch.setattr(optimizer, "build_optimizer", single)
    monkeypatch.setattr(callbacks, "set_group", set_single)
    monkeypatch.setattr(callbacks.About, "state_dict", lambda about: {"about": about.about})


@pytest.mark.usefixtures("before")
def test_a_checkpoint_of_before_goes_on_as_it_was_and_later_ones_too(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("whole", 30)
    train("parts", 7)
    saved = read_checkpoint(tmp_path / "parts/ep0-ba7-rank0.pt")
    assert len(saved["optimizers"]["DecoupledAdamW"]["param_groups"]) == 1
    assert "optimizer" not in saved["callbacks"]["About"]["about"]
    monkeypatch.undo()  # the program of today
    for until in (20, 30):
        capsys.readouterr()
        train("parts", until)
        assert "weight decay is on all parameters, as in the checkpoint" in capsys.readouterr().err
    assert_same(state_of(tmp_path / "parts", 30), state_of(tmp_path / "whole", 30))
    assert decays_of(tmp_path / "parts", 30) == {
        "matrices": 0.1, "rest": 0.1, "name": "adamw", "weight_decay_on": "all"
    }  # fmt: skip


def test_what_decays_may_change_from_a_checkpoint_on(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrices = {"matrices": 0.1, "rest": 0.0, "name": "adamw", "weight_decay_on": "matrices"}
    train("run", 5)
    assert decays_of(tmp_path / "run", 5) == matrices
    assert "weight decay is on" not in capsys.readouterr().err
    train("run", 10, "optimizer.weight_decay_on=all")
    said = "`optimizer.weight_decay_on` is all from here on; the checkpoint (step 5) was trained with matrices"
    assert said in capsys.readouterr().err
    assert decays_of(tmp_path / "run", 10)["rest"] == 0.1
    train("run", 15, "optimizer.weight_decay_on=matrices")
    train("run", 20)
    assert decays_of(tmp_path / "run", 20) == matrices


@needs_muon
def test_a_checkpoint_of_another_optimizer_is_refused(train: Run, tmp_path: Path) -> None:
    """Composer would pass over its moments with a warning, and train on from nothing."""
    train("run", 5)
    with pytest.raises(UserError, match=r"`optimizer.name` is muon, the checkpoint \(step 5\) was trained with adamw"):
        train("run", 10, "optimizer.name=muon")
    train("muon", 5, "optimizer.name=muon")
    with pytest.raises(UserError, match=r"`optimizer.name` is adamw, .* was trained with muon"):
        train("branch", 10, f"load_path={tmp_path}/muon/ep0-ba5-rank0.pt")


@pytest.mark.usefixtures("before")
def test_fsdp_keeps_the_groups_and_takes_a_checkpoint_of_before(
    train: Run, overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ["model.attention_dropout=0.0", "model.tie_word_embeddings=false"]
    for name in ("run", "whole"):
        train(name, 5, *exact)
    monkeypatch.undo()
    exact.append("optimizer.weight_decay_on=matrices")
    train("whole", 15, *exact)
    sharded = "parallelism={fsdp: {sharding_strategy: FULL_SHARD}}"
    config = overrides("run", *QUICK, *exact, sharded, "max_duration=10ba")
    code, output = finish(launch(2, *config, module="tests.train.fsdp_on_cpu"))
    assert code == 0, output
    train("run", 15, *exact)  # one rank, from the sharded model's; test_launches.py goes the other way
    for step in (10, 15):
        assert decays_of(tmp_path / "run", step) == decays_of(tmp_path / "whole", step)
        ours, theirs = state_of(tmp_path / "run", step), state_of(tmp_path / "whole", step)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)
