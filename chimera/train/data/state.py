"""What a checkpoint says of the data, and whether a config may go on from it.

History is immutable, the future is editable: everything that decided the steps so far must be as it was; phases,
stages and streams that only later steps use may change.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from chimera.cli import UserError, say
from chimera.tokenizer_file import load
from chimera.train.order.ordering import ORDER_VERSION
from chimera.train.order.schedule import Plan
from chimera.versions import with_both_names

VERSION = 1

FIELDS = {
    "phase_start": "the first step of its phase",
    "seq_len": "`curriculum`: the sequence length",
    "sequences_per_step": "`global_train_batch_size`: sequences a step",
    "proportions": "`phases`: the proportions",
}

# Keys of a model's configuration that leave what its weights mean as it is.
FREE = re.compile(
    r".*drop.*|_attn_implementation.*|use_cache|transformers_version|(torch_)?dtype|_name_or_path|architectures"
    r"|initializer_range|(bos|eos|pad)_token_id"
)


# Keys that transformers 5 adds to `rope_parameters`, with what follows from the rest.
ADDED = {"original_max_position_embeddings", "partial_rotary_factor"}


class StateMismatch(UserError):
    """A checkpoint whose history is not the config's; the message names what differs, both values, the remedy."""


def make_state(plan: Plan, seed: int, fingerprints: Mapping[str, str], step: int) -> dict[str, Any]:
    """The state before `step`: plain numbers, strings, lists and dicts. `fingerprints` by stream."""
    return {
        "version": VERSION,
        "step": step,
        "block_cursor": plan.block_of(step),
        "consumed": plan.blocks_before(step),
        "fingerprints": dict(fingerprints),
        "settings": {
            "order": ORDER_VERSION,
            "seed": seed,
            "block_len": plan.block_len,
            "lanes": plan.lanes,
            "history": history(plan, step),
        },
    }


def history(plan: Plan, step: int) -> list[dict[str, Any]]:
    """What decided the order of steps [0, step), in runs of equal steps."""
    runs = []
    for segment in plan.segments:
        if segment.first_step < step:
            proportions = plan.phases[segment.phase].proportions
            runs.append(
                {
                    "first_step": segment.first_step,
                    "end_step": min(step, segment.end_step),
                    "phase_start": plan.phase_start(segment.phase),
                    "proportions": {name: str(share) for name, share in sorted(proportions.items()) if share},
                    "seq_len": segment.seq_len,
                    "sequences_per_step": segment.sequences_per_step,
                }
            )
    return runs


def resume_step(state: Any, plan: Plan, seed: int, fingerprints: Mapping[str, str]) -> int:
    """The step to go on at; raises `StateMismatch` unless `plan` has the history that `state` was saved with."""
    if not isinstance(state, dict) or "block_cursor" not in state:
        raise StateMismatch("the checkpoint holds no state of this data (another dataset's?): start a new run")
    if state.get("version") != VERSION:
        raise StateMismatch(
            f"the checkpoint's data state is of version {state.get('version')}, this program reads {VERSION}: resume "
            "with the version of chimera that saved it"
        )
    step = int(state["step"])
    at = f"the checkpoint (step {step})"
    if step > plan.steps:
        raise StateMismatch(f"{at} is past the config's {plan.steps} steps: lengthen `phases`, or start a new run")
    now = make_state(plan, seed, fingerprints, step)
    settings, old = now["settings"], state["settings"]
    for key, label in {
        "order": "the program's order of blocks",
        "seed": "setting `seed`",
        "block_len": "the shards' block_len",
        "lanes": "setting `num_canonical_nodes`",
    }.items():
        if settings[key] != old[key]:
            raise StateMismatch(
                f"{label} is {settings[key]}, {at} was trained with {old[key]}: set it back, or start a new run"
            )
    _compare_history(old["history"], settings["history"], at)
    for name, blocks in state["consumed"].items():
        if not blocks:
            continue
        if fingerprints.get(name) != state["fingerprints"][name]:
            raise StateMismatch(
                f"stream {name}: its shards' index is {str(fingerprints.get(name))[:12]}, {at} has trained on "
                f"{blocks} blocks of {state['fingerprints'][name][:12]}: bring those shards back, or start a new run"
            )
    for key in ("block_cursor", "consumed"):
        mine = {n: b for n, b in now[key].items() if b} if key == "consumed" else now[key]
        theirs = {n: b for n, b in state[key].items() if b} if key == "consumed" else state[key]
        if mine != theirs:
            raise StateMismatch(f"{key} is {theirs} in {at}, the config makes it {mine}: start a new run")
    return step


def check_model(old: Mapping[str, Any], new: Mapping[str, Any], step: int, own: bool) -> None:
    """Raise `StateMismatch` unless the weights of a checkpoint mean the same in this run's model.

    What a step trains on must stay too where the run goes on in its folder; a branch may change that, and a line says
    so. What the checkpoint does not know of, being of an earlier version, is not compared.

    Args:
        old: of the checkpoint, what `About` keeps.
        new: the same of this run.
        step: of the checkpoint.
        own: whether the checkpoint is one of the run's own folder.
    """
    at = f"the checkpoint (step {step})"
    if "tokenizer" in old and (token := _other_token(old, new)):
        raise StateMismatch(
            f"the tokenizer is not the one {at} was trained with, {token} for one: bring back setting `tokenizer`, or "
            "these shards' own, or start a new run"
        )
    was, now = (with_both_names(json.loads(each["model_config"])) for each in (old, new))
    keys = [key for key in was if key in now and _differ(was[key], now[key]) and not FREE.fullmatch(key)]
    if not was.get("sliding_window") and not now.get("sliding_window"):  # 0 to transformers 4, null to 5
        keys = [key for key in keys if key != "sliding_window"]
    if was.get("rope_theta") and not was.get("rope_scaling"):  # computed: a longer stage to come may need more of them
        keys = [key for key in keys if key != "max_position_embeddings"]
    if keys:
        # head_dim follows from others, rope_parameters from what older names say
        key = min(keys, key=lambda key: (key != "model_type", key in ("head_dim", "rope_parameters"), key))
        raise StateMismatch(
            f"setting `model`: {key} is {_show(now[key])}, {at} was trained with {_show(was[key])}: set it back, or "
            "start a new run"
        )
    old, new = ({"document_ends": "eos", **each} for each in (old, new))
    for key in ("train_on", "document_mask", "document_ends"):
        if new[key] == old.get(key, new[key]):
            continue
        if own:
            raise StateMismatch(
                f"setting `{key}` is {_show(new[key])}, {at} was trained with {_show(old[key])}: set it back, or "
                "start a new run"
            )
        say(f"setting `{key}` is {_show(new[key])} from here on; {at} was trained with {_show(old[key])}")


def check_weights(old: Collection[str], new: Collection[str], config: Mapping[str, Any], step: int) -> None:
    """Raise `StateMismatch` unless the weights of a checkpoint have the names they have in this run's model.

    transformers 5 keeps the experts of some mixtures in one tensor, 4 each in its own.
    """
    if other := sorted(set(old) ^ set(new)):
        raise StateMismatch(
            f"the weights have other names than in the checkpoint (step {step}), {other[0]} for one: it was saved with "
            f"transformers {config.get('transformers_version')}: go on with that version, or start a new run"
        )


def _differ(was: Any, now: Any) -> bool:
    """Whether two values of a model's configuration differ, but for what transformers 5 adds to a rotation."""
    if isinstance(was, dict) and isinstance(now, dict):
        return any(_differ(was.get(key), now.get(key)) for key in (was.keys() | now.keys()) - ADDED)
    return bool(was != now)


def _other_token(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What of the old tokenizer (`About` keeps it) is another id or mark in the new one, if anything.

    Tokens may be added: no text trained on so far had them.
    """
    for key in ("eos_token", "pad_token"):
        was, now = (each[key] or each["eos_token"] for each in (old, new))  # no pad token: EOS fills the last block
        if was != now:
            return f"{key} {now!r} and not {was!r}"
    if old["tokenizer"] == new["tokenizer"]:
        return None
    ids, more = (load(each["tokenizer"]).get_vocab(with_added_tokens=True) for each in (old, new))
    other = min(ids.items() - more.items(), key=lambda item: item[1], default=None)
    return other and f"token {other[1]}"


def _compare_history(old: list[dict[str, Any]], new: list[dict[str, Any]], at: str) -> None:
    """Refuse at the first run of steps that differs."""
    for was, now in zip(old, new, strict=False):
        for key, label in FIELDS.items():
            if was[key] != now[key]:
                raise StateMismatch(
                    f"{label} at step {now['first_step']} is {_show(now[key])}, {at} was trained with "
                    f"{_show(was[key])}: steps already trained cannot change; set it back, or start a new run"
                )
        if was["end_step"] != now["end_step"]:
            raise StateMismatch(
                f"the config changes mixture or length at step {now['end_step']}, {at} was trained with a change at "
                f"step {was['end_step']}: set `phases` and `curriculum` back, or start a new run"
            )


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as YAML has it
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
