"""The optimizer: which weights decay, which of them Muon trains, and what a checkpoint says of both.

Weight decay pulls weights towards zero. That is meant for the matrices of linear layers; biases, gains of norms and
embeddings are scales and positions of their own, and by default do not decay (as in GPT-3 and most models since).
What a parameter is follows from the model itself, not from a list of names:

    matrix  two dimensions, in the hidden layers; with `optimizer.name: muon`, Muon trains it
    head    the output layer of its own weights, and stacks of matrices (experts); decays, but is not for Muon
    rest    biases, gains of norms, embeddings; a head that shares the embedding's weights is an embedding

One meaning of two settings, for both optimizers: `lr` is the step of AdamW, to whose size Muon's is scaled;
`weight_decay` is the share of a weight that a step at the peak learning rate removes, and follows the schedule.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.optim import DecoupledAdamW
from torch import nn
from transformers import PreTrainedModel

from chimera.cli import UserError, say
from chimera.train.data.state import StateMismatch
from chimera.train.settings import OptimizerSettings, TrainSettings

Group = dict[str, Any]  # of an optimizer: `params`, its `kind` (matrices | rest | all) and their settings

BEFORE = {"name": "adamw", "weight_decay_on": "all"}  # checkpoints that do not say it


def parameter_kinds(model: PreTrainedModel) -> dict[str, str]:
    """Of each parameter, by name: `matrix`, `head` or `rest`, as the module's docstring has them.

    A parameter that several modules share is there once, by its first name. Mamba's tables mark themselves as not to
    decay; Cohere's norms and the biases of some experts have two dimensions, though they are no matrices.
    """
    rest: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            rest |= {id(parameter) for parameter in module.parameters(recurse=False)}
    head = model.get_output_embeddings()
    heads = set() if head is None else {id(parameter) for parameter in head.parameters()}

    def kind(name: str, parameter: nn.Parameter) -> str:
        no_decay = name.endswith("bias") or getattr(parameter, "_no_weight_decay", False)
        if parameter.ndim < 2 or id(parameter) in rest or no_decay:
            return "rest"
        return "matrix" if parameter.ndim == 2 and id(parameter) not in heads else "head"

    return {name: kind(name, parameter) for name, parameter in model.named_parameters()}


def check_muon(settings: TrainSettings) -> None:
    """Raise `UserError` where Muon is asked for and cannot be."""
    if settings.optimizer.name != "muon":
        return
    if settings.parallelism:
        raise UserError(
            "setting `optimizer.name: muon` needs whole matrices on each rank, and `parallelism` cuts them: leave "
            "`parallelism` out, or take adamw"
        )
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"setting `optimizer.name: muon` needs torch 2.9 or later, and {torch.__version__} is installed: take adamw"
        )


def settle_decay(options: OptimizerSettings, was: Mapping[str, str], step: int) -> str:
    """The `weight_decay_on` that a run goes on with from a checkpoint: the config's, else the checkpoint's.

    Raises `StateMismatch` for another optimizer than the checkpoint's: their moments are not the same.

    Args:
        was: what the checkpoint says of its optimizer; empty: it is of before this was recorded.
        step: of the checkpoint.
    """
    old, at = {**BEFORE, **was}, f"the checkpoint (step {step})"
    if options.name != old["name"]:
        raise StateMismatch(
            f"setting `optimizer.name` is {options.name}, {at} was trained with {old['name']}, whose moments are no "
            "start for it: set it back, or export the weights and start a new run from them with `model.pretrained`"
        )
    decay = options.weight_decay_on or old["weight_decay_on"]
    if decay != old["weight_decay_on"]:
        say(
            f"setting `optimizer.weight_decay_on` is {decay} from here on; {at} was trained with "
            f"{old['weight_decay_on']}"
        )
    elif options.weight_decay_on is None and decay == "all":
        say(
            f"weight decay is on all parameters, as in {at}; new runs spare biases, norms and embeddings, and so will "
            "this one with `optimizer.weight_decay_on=matrices`"
        )
    return decay


def build_optimizer(model: PreTrainedModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for, over every parameter of `model` once.

    The groups are the same whatever decays, so that a checkpoint fits either way; one of before, of a single group,
    fits too (`_keep_settings`). Raises `UserError` where FSDP makes one tensor of weights that decay and others.
    """
    options, kinds = settings.optimizer, parameter_kinds(model)

    def group(kind: str, *wanted: str) -> Group:
        return {"kind": kind, "params": [p for name, p in model.named_parameters() if kinds[name] in wanted]}

    optimizer: torch.optim.Optimizer
    if not (settings.parallelism.get("fsdp") or {}).get("use_orig_params", True):
        if options.weight_decay_on != "all":
            raise UserError(
                "setting `parallelism.fsdp.use_orig_params: false` makes one tensor of matrices and the rest: leave "
                "it out, or set `optimizer.weight_decay_on=all`"
            )
        optimizer = _adamw([group("all", "matrix", "head", "rest")], options)
    elif options.name == "muon":
        optimizer = MuonAdamW(
            [group("matrices", "matrix")], [group("matrices", "head"), group("rest", "rest")], options
        )
    else:
        optimizer = _adamw([group("matrices", "matrix", "head"), group("rest", "rest")], options)
    for each in optimizer.param_groups:
        set_group(each, options, 1.0)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def set_group(group: Group, options: OptimizerSettings, share: float) -> None:
    """Give a group the settings of a step that trains with `share` of the peak learning rate."""
    decays = group["kind"] != "rest" or options.weight_decay_on == "all"
    group["lr"], group["initial_lr"] = share * options.lr, options.lr  # weights decay by lr / initial_lr
    group["weight_decay"] = options.weight_decay if decays else 0.0
    if not _is_muon(group):
        group["betas"], group["eps"] = tuple(options.betas), options.eps


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for all else, as one optimizer with one state: Composer takes only one.

    Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, its steps scaled to the size
    of AdamW's as in Liu et al., "Muon is Scalable for LLM Training", 2025; so one learning rate serves both.

    Args:
        matrices: groups of parameters of two dimensions each, for Muon.
        others: groups for AdamW.
    """

    def __init__(self, matrices: list[Group], others: list[Group], options: OptimizerSettings) -> None:
        self.muon = torch.optim.Muon(matrices, lr=options.lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = _adamw(others, options)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; what `closure` returns, after which they step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A loaded checkpoint replaces groups and state, so both get them anew. torch's Muon multiplies the decay by
        # the learning rate; divided by its peak, it is what DecoupledAdamW takes it for.
        self.muon.param_groups = [
            {**group, "weight_decay": group["weight_decay"] / (group["initial_lr"] or 1.0)}
            for group in self.param_groups
            if _is_muon(group)
        ]
        self.adamw.param_groups = [group for group in self.param_groups if not _is_muon(group)]
        for optimizer in (self.muon, self.adamw):
            optimizer.state = self.state
            optimizer.step()
        return loss


def _is_muon(group: Group) -> bool:
    return "betas" not in group  # AdamW's


def _adamw(groups: list[Group], options: OptimizerSettings) -> DecoupledAdamW:
    return DecoupledAdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint, take the moments alone: each group keeps the settings of this run.

    Moments are matched by the parameters' names, so those of a single group fill several. torch then copies the saved
    group's settings to the last of them only; the others would have none.
    """
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [{**ours, "params": theirs["params"]} for ours, theirs in groups]}
