"""What a run is refused for before step 0: one list, gone through by training, plan.py and inspect_batch.py alike.

What only the machine that trains can tell (a GPU is missing), and what only a checkpoint can, is not in it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError, parse_bytes
from chimera.text import counted
from chimera.train.data.cache import check_limit
from chimera.train.data.external_shards import NO_PADDING, turn_end
from chimera.train.data.shards import Shards, not_there
from chimera.train.order.run_plan import end_step, eval_lengths, eval_streams
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings
from chimera.train.step.base import check_pretrained
from chimera.train.step.schedulers import check_scheduler


def refuse(settings: TrainSettings, plan: Plan, shards: Shards) -> None:
    """Raise the first of `refusals`."""
    for error in refusals(settings, plan, shards):
        raise error


def refusals(settings: TrainSettings, plan: Plan, shards: Shards | None, stored: bool = True) -> Iterator[UserError]:
    """Each reason not to train, in order; without `shards` those that need none.

    `stored`: the plan is in the blocks that there are, not in those of the longest length.
    """
    checks: list[Callable[[], object]] = [] if shards is None else [lambda: shards.check(plan.streams)]
    checks += [
        lambda: check_scheduler(settings.scheduler, plan.steps),
        lambda: end_step(settings.max_duration, plan.steps),
    ]
    if settings.cache_limit is not None:
        limit = settings.cache_limit
        checks += [lambda: parse_bytes(limit, "cache_limit"), lambda: check_limit(settings.shards)]
    if stored and settings.eval.interval:
        checks.append(lambda: eval_lengths(settings, plan))
    if shards is not None:
        tokenizer = shards.tokenizer
        checks += [
            lambda: shards.check_tokenizer(settings.tokenizer),
            lambda: check_evaluated(settings, shards),
            lambda: check_ends(shards, plan),
            lambda: check_untrained(settings.train_on, shards, plan),
            lambda: check_pretrained(settings.model.get("pretrained"), tokenizer.path),
        ]
    checks.append(lambda: check_optimizer(settings))
    if settings.model:  # none: the batches of a loop of the user's own
        checks.append(lambda: check_model(settings, plan, shards))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield error


def check_evaluated(settings: TrainSettings, shards: Shards) -> None:
    """Raise `UserError` where a stream of `eval.streams` cannot be evaluated; of others that is only said."""
    for name in settings.eval.streams or ():
        if name not in shards.streams:
            raise UserError(f"setting `eval.streams`: stream `{name}` {not_there(shards.where, shards.streams)}")
        if not shards.streams[name].eval.blocks:
            raise UserError(
                f"setting `eval.streams`: stream `{name}` at {shards.root_of(name)} has no eval split: build it with "
                "`eval_sources`, or with `eval_fraction` above 0"
            )


def check_ends(shards: Shards, plan: Plan) -> None:
    """Raise `UserError` where the ids for padding, the end of a document and the end of a turn are not told apart."""
    tokenizer = shards.tokenizer
    if tokenizer.pad_id == tokenizer.eos_id:
        raise UserError(
            f"the shards at {shards.where} have {tokenizer.eos_token} for padding and for the end of a document, which "
            "must differ: build them with another `tokenizer.pad_token`"
        )
    for name in plan.streams:
        if name not in shards.streams or shards.streams[name].format != "chatml":
            continue
        for key, token in (("eos_token", tokenizer.eos_token), ("pad_token", tokenizer.pad_token)):
            if token in (IM_START, IM_END):
                raise UserError(
                    f"stream `{name}`: {token} is a mark of its turns and the shards' `tokenizer.{key}`: no such mark "
                    f"would be {'trained' if key == 'pad_token' else 'told from the end of a document'}: build the "
                    f"shards with another `tokenizer.{key}`"
                )


def check_untrained(train_on: str, shards: Shards, plan: Plan) -> None:
    """Raise `UserError` where turns that the data marks as not to be learned would be learned."""
    for name in plan.streams if train_on == "all" else ():
        if name in shards.streams and (count := shards.streams[name].turns.get("untrained")):
            raise UserError(
                f"stream `{name}`: {counted(count, 'turn')} of the assistant are marked as not to be learned (`weight` "
                "or `train` 0), and `train_on: all` learns every token: set `train_on: assistant`, or take them out"
            )


def cautions(settings: TrainSettings, shards: Shards | None) -> Iterator[str]:
    """What to look at before training, which may be as it should."""
    trained_on = dict.fromkeys(name for phase in settings.phases for name in phase.proportions)
    for name in trained_on if shards else ():
        if shards and name in shards.streams and (rows := sum(shards.streams[name].overlap.values())):
            yield (
                f"stream {name}: the text of {counted(rows, 'row')} that it trains on is in its eval sources too, and "
                "their loss says less: build it with `eval_overlap: remove`"
            )
    if shards is None or shards.tokenizer.pad_id != NO_PADDING or settings.tokenizer is None:
        return
    if end := turn_end(Path(settings.tokenizer)):  # of shards made by others
        yield (
            f"setting `tokenizer`: its eos_token {end} also ends the turns of its chat template: if the shards at "
            f"{shards.where} hold chats, each turn counts as a document of its own: name a folder whose eos_token ends "
            "documents alone"
        )


def check_optimizer(settings: TrainSettings) -> None:
    """Raise `UserError` where optimizer and parallelism cannot be what the settings ask for."""
    if settings.optimizer.name == "muon":
        from chimera.train.step.optimizer import check_muon

        check_muon(settings)
    if settings.parallelism:
        from chimera.train.step.model_checks import check_parallelism

        check_parallelism(settings.parallelism)


def check_model(settings: TrainSettings, plan: Plan, shards: Shards | None) -> None:
    """Raise `UserError` unless a model can be made of the settings that takes the plan's sequences and ids."""
    from chimera.train.step.configuration import check_tokens, configuration, make_empty, positions

    tokenizer = None if shards is None else shards.tokenizer
    size, eos, pad = (1, 0, -1) if tokenizer is None else (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    config = configuration(settings, size, eos, pad)
    if not settings.model.get("pretrained"):
        make_empty(config)
    check_positions(positions(config), plan, settings.beyond_positions)
    if shards is not None:
        vocabulary = config.vocab_size if settings.model.get("vocab_size") else max(config.vocab_size, size)
        check_tokens(shards.largest_ids([*plan.streams, *eval_streams(settings, plan)]), vocabulary)


def check_positions(bound: int | None, plan: Plan, beyond: bool) -> None:
    """Raise `UserError` where sequences of the plan have more than a model's `bound` positions (None: it has none).

    `beyond` allows it.
    """
    longest = max(plan.segments, key=lambda segment: segment.seq_len)
    if bound is None or longest.seq_len <= bound or beyond:
        return
    raise UserError(
        f"sequences of {longest.seq_len} tokens (phase {longest.phase_name}, from step {longest.first_step}) are "
        f"longer than the model's {bound} positions (`model.max_position_embeddings`, or what its type calls them): "
        "shorten `curriculum.stages`, raise it for a new model, or set `beyond_positions: true` for one with rotary "
        "positions, whose export then names the longer context"
    )
