"""A save folder's files, read into a `Run`: what a running process has not finished, or damage left, is left out.

Everything is derived from `config.json`, `steps.jsonl`, `metrics.jsonl`, `starts.jsonl` and the checkpoints' names,
so it works while the run goes on, after it, and without its shards.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from chimera.cli import UserError
from chimera.config import load_settings, validated
from chimera.text import one_line
from chimera.train.history.runlog import Points, Run
from chimera.train.order.run_plan import densities, plan_of
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings

CHECKPOINT = re.compile(r"ep\d+-ba(\d+)-rank\d+\.pt")
EVAL_LOSS = re.compile(r"metrics/eval/(.+)/(\d+)/loss")
SPEED = "throughput/tokens_per_sec"
KINDS = {
    "settings": dict,
    "block_len": int,
    "blocks": dict,
    "tokens": dict,
    "indexes": dict,
    "versions": dict,
    "parent": dict,
}  # of config.json
PARENT = {"address": str, "checkpoint": str, "step": int, "digest": str, "run_name": str}


def read_run(folder: Path, address: str | None = None, stored: Sequence[tuple[str, int]] | None = None) -> Run:
    """The run in a save folder; raises `UserError` where there is none that can be read.

    Args:
        folder: a local one.
        address: what the run is called by, where `folder` is a copy of its files.
        stored: (name, bytes) of what is there; None: what is in `folder`.
    """
    config = folder / "config.json"
    address = str(folder) if address is None else address
    if stored is None:
        stored = [(path.name, path.stat().st_size) for path in folder.iterdir()] if folder.is_dir() else []
    try:
        about, settings = read_config(config.read_bytes(), config)
    except FileNotFoundError:
        raise UserError(
            f"no run in {address} (no config.json there): give the `save_folder` of a run; one that has just been "
            "started writes it before its first step, to a store with its first checkpoint"
        ) from None
    with _as_written(config):
        block_len = about["block_len"]
        held = densities(about.get("tokens", {}), about.get("blocks", {}), block_len)
        plan = plan_of(settings, block_len, held)

    lines = _steps(folder / "steps.jsonl", plan)
    metrics: list[dict[str, Any]] = [
        {key: value for key, value in line.items() if _is(value, int | float)}
        for line in _json_lines(folder / "metrics.jsonl", step=int)
    ]
    evals: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            if match := EVAL_LOSS.fullmatch(key):
                evals.setdefault((match[1], int(match[2])), []).append((line["step"], value))
    # lines of before tokens were counted have positions alone
    tokens = [[line.get("stream_tokens", line["streams"]).get(name, 0) for name in plan.streams] for line in lines]
    blocks = [[line["streams"].get(name, 0) // block_len for name in plan.streams] for line in lines]
    return Run(
        address=address,
        about=about,
        settings=settings,
        plan=plan,
        steps=np.array([line["step"] for line in lines], np.int64),
        loss=np.array([line["loss"] for line in lines], np.float64),  # null becomes nan
        trained=np.array([line["trained"] for line in lines], np.int64),
        blocks=np.array(blocks, np.int64).reshape(len(lines), len(plan.streams)),
        stream_tokens=np.array(tokens, np.int64).reshape(len(lines), len(plan.streams)),
        digests=[line["digest"] for line in lines],
        starts=list(_json_lines(folder / "starts.jsonl", from_step=int, ranks=int)),
        evals={key: _points(points) for key, points in sorted(evals.items())},
        speed=_points([(line["step"], line[SPEED]) for line in metrics if SPEED in line]),
        checkpoints=sorted(
            (int(match[1]), name, size) for name, size in stored if (match := CHECKPOINT.fullmatch(name))
        ),
    )


def read_config(data: bytes, name: object, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], TrainSettings]:
    """What a run's config.json says, and the settings in it, under `key=value` overrides.

    Raises `UserError` that calls it `name` where train/main.py did not write it.
    """
    with _as_written(name):
        about = json.loads(data)
        for key, kind in KINDS.items():
            if not _is(about.get(key, kind()), kind):  # those that an earlier version did not write are optional
                raise TypeError(f"`{key}` is {about[key]!r}")
        for key, kind in PARENT.items() if about.get("parent") else ():
            if not _is(about["parent"].get(key), kind):
                raise TypeError(f"`parent.{key}` is {about['parent'].get(key)!r}")
        settings = validated(TrainSettings, about["settings"], f"{name} is of another version")
    if overrides:
        settings = load_settings(TrainSettings, str(name), overrides, about["settings"])
    return about, settings


@contextmanager
def _as_written(name: object) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name} is not one that train/main.py wrote: {one_line(repr(error))}") from None


def _steps(path: Path, plan: Plan) -> list[dict[str, Any]]:
    """The lines of steps.jsonl that say all of a step of the plan, each a later one's; damaged ones are left out."""
    found: list[dict[str, Any]] = []
    for line in _json_lines(path, step=int, loss=int | float | None, digest=str, streams=dict):
        after = found[-1]["step"] if found else -1
        tokens = line.get("stream_tokens", {})
        sound = "loss" in line and isinstance(tokens, dict)
        counts = [line.get("trained", 0), *line["streams"].values(), *(tokens.values() if sound else ())]
        sound = sound and all(_is(count, int) and count >= 0 for count in counts) and any(line["streams"].values())
        line.setdefault("trained", sum(line["streams"].values()) if sound else 0)
        if after < line["step"] < plan.steps and sound and (line["loss"] is None or math.isfinite(line["loss"])):
            found.append(line)
    return found


def _points(points: list[tuple[int, float]]) -> Points:
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def _json_lines(path: Path, **kinds: Any) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file that have `kinds`' keys with values of these types.

    Others are left out: what a running process has not finished writing, or what damage left.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict) and all(_is(value.get(key), kind) for key, kind in kinds.items()):
                yield value


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of `kind`; true and false are no numbers, nor is what no array holds."""
    wide = isinstance(value, int) and abs(value) >= 1 << 63
    return isinstance(value, kind) and not isinstance(value, bool) and not wide
