"""How far a build is, for whoever asks from another terminal or machine. Nothing is written.

What is done is read from the journals of the parts, so it is what a kill would leave. Rate and time left follow from
what has moved since the builder started: it wrote then how far each stream was (`start.json`), and from that file's
time to its last sign of life is how long it has run, both by the clock of the file system.
"""

import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from chimera.convert.build import part_state
from chimera.convert.build.dispatch import START
from chimera.convert.build.growth import is_published
from chimera.convert.build.outputs import manifest_of, open_output
from chimera.convert.build.part_lock import at_work
from chimera.convert.build.part_state import COMMITS, EVAL, PartState
from chimera.convert.build.plan import BuildPlan, StreamPlan, load_plan
from chimera.convert.build.stream_status import StreamStatus, finished, progress_of
from chimera.convert.build.work_lock import PATIENCE, Holder, holder_of, last_sign
from chimera.convert.settings import CLAIMS, LEASE, WORK, BuildSettings
from chimera.files import is_locked
from chimera.manifest import Manifest
from chimera.mds import Json
from chimera.objects import Objects
from chimera.text import NONE, amount, duration, one_line, percent, size, table


@dataclass(frozen=True)
class BuildStatus:
    """`state` is one of `STATES`; `silent` are the seconds since the builder's last sign of life.

    `seconds`: how long the builder has worked on parts. `claims`: what other builders of the output say
    of themselves, by stream. `others`: those of other streams (`only`) whose unfinished work lies in the output, by
    their streams: state, work, holder and silent, as of this one.
    """

    state: str
    output: str
    work: str
    holder: Holder | None
    silent: float | None
    seconds: float | None
    claims: dict[str, Json]
    streams: dict[str, StreamStatus]
    others: dict[str, Json] = field(default_factory=dict)

    def as_json(self) -> Json:
        """One JSON object; docs/formats.md has its keys."""
        value = asdict(self)
        for name, stream in self.streams.items():
            if stream.parts:
                value["streams"][name]["parts"]["waiting"] = stream.parts.waiting
        return value


STATES = {
    "finished": "is finished",
    "building": "is being built",
    "planning": "is being planned",
    "publishing": "is being published: all parts are done",
    "stopped": "is not finished, and nobody builds it: the build's command goes on",
    "elsewhere": "is being built, or was stopped, by another builder",
    "none": "is not begun",
}


class StatusReader:
    """Reads a build's status, again and again; journals that have not changed are not read twice."""

    def __init__(self, settings: BuildSettings) -> None:
        self._settings, self._work = settings, settings.work_folder
        self._output = open_output(settings)
        self._store = Objects(settings.output, settings.retries)
        self._read: dict[Path, tuple[tuple[int, int], PartState]] = {}
        self._peers: dict[Path, StatusReader] = {}

    def read(self) -> BuildStatus:
        """The status now. Raises `UserError` for damaged work or a foreign manifest."""
        status = self._own()
        streams, others = dict(status.streams), dict[str, Json]()
        for peer in self._others():
            other, names = peer._own(), peer._settings.only
            found = {name: stream for name, stream in other.streams.items() if name.removesuffix(EVAL) in names}
            if other.state in ("none", "elsewhere", "finished"):  # it has just ended
                continue
            others[",".join(names)] = {
                "state": other.state,
                "work": other.work,
                "holder": asdict(other.holder) if other.holder else None,
                "silent": other.silent,
            }
            streams |= found
        state = "elsewhere" if others and status.state == "none" else status.state
        return replace(status, state=state, streams=streams, others=others)

    def _others(self) -> "list[StatusReader]":
        """Readers of the unfinished work of other streams, each in a folder of its own in the output."""
        if self._settings.remote or self._settings.work is not None:
            return []
        peers = []
        for file in sorted(Path(self._settings.output).absolute().glob(f"{WORK}*/plan.json")):
            with suppress(FileNotFoundError):
                names = sorted({name.removesuffix(EVAL) for name in load_plan(file.parent).streams})
                settings = self._settings.model_copy(update={"only": names, "streams": {}})
                if file.parent not in (self._work, *self._peers) and settings.work_folder == file.parent:
                    self._peers[file.parent] = StatusReader(settings)
                peers += [self._peers[file.parent]] if file.parent in self._peers else []
        return peers

    def _own(self) -> BuildStatus:
        while True:
            plan = self._plan()
            manifest = manifest_of(self._output)
            if plan and manifest and is_published(plan, manifest):
                plan = None  # only its folder is left
            states = {name: self._states(stream) for name, stream in plan.streams.items()} if plan else {}
            if plan is None or ((now := self._plan()) and now.id == plan.id):  # or it went while it was read
                return self._status(plan, manifest, states)

    def _plan(self) -> BuildPlan | None:
        with suppress(FileNotFoundError):
            return load_plan(self._work)
        return None

    def _status(
        self, plan: BuildPlan | None, manifest: Manifest | None, states: dict[str, list[PartState]]
    ) -> BuildStatus:
        holder, sign = holder_of(self._work), last_sign(self._work)
        silent = None if holder is None or sign is None else max(0.0, time.time() - sign)
        alive = holder is not None and silent is not None and _alive(holder, silent)
        start, started = self._start()
        seconds = max(0.0, sign - started) if alive and sign is not None and started is not None else None
        streams = {name: finished(stream) for name, stream in manifest.streams.items()} if manifest else {}
        if plan:
            streams = {} if plan.clearing else streams
            for name, stream in plan.streams.items():
                running = [self._runs(stream, index) for index in range(len(stream.parts))] if alive else []
                streams[name] = progress_of(stream, states[name], sum(running), start.get(name), seconds)
        wanted = self._settings.streams.keys()
        mine = {name.removesuffix(EVAL) for name in plan.streams} if plan else {*streams}
        found = self._claims() if plan or not alive else {}  # while it plans they may be the builder's own
        claims = {name: claim for name, claim in found.items() if name not in mine}
        sent = self._sent() if claims else {}
        streams |= {name: StreamStatus("elsewhere", shards=sent.get(name, 0)) for name in claims if name != LEASE}
        order = [*wanted, *(f"{name}{EVAL}" for name in wanted if f"{name}{EVAL}" in streams)]
        streams = {name: streams.get(name, StreamStatus("waiting")) for name in [*order, *sorted(streams)]}
        return BuildStatus(
            _state(plan, alive, claims, streams),
            self._settings.output,
            str(self._work),
            holder,
            silent,
            seconds,
            claims,
            streams,
        )

    def _start(self) -> tuple[dict[str, float], float | None]:
        """How far each stream was when the builder started on parts, and when that was."""
        with suppress(FileNotFoundError, ValueError), open(self._work / START, "rb") as file:
            return json.load(file)["streams"], os.fstat(file.fileno()).st_mtime
        return {}, None

    def _states(self, stream: StreamPlan) -> list[PartState]:
        return [self._load(stream.part_folder(self._work, index)) for index in range(len(stream.parts))]

    def _load(self, folder: Path) -> PartState:
        try:
            found = os.stat(folder / COMMITS)
        except FileNotFoundError:
            return part_state.load(folder)
        key = found.st_size, found.st_mtime_ns
        known = self._read.get(folder)
        if known is None or known[0] != key:
            self._read[folder] = known = key, part_state.load(folder)
        return known[1]

    def _runs(self, stream: StreamPlan, index: int) -> bool:
        with suppress(OSError):  # it may not be asked: a folder of another user's
            return at_work(stream.part_folder(self._work, index))
        return False

    def _claims(self) -> dict[str, Json]:
        """What builders say of themselves in the output, by the stream that they build."""
        if self._settings.remote:
            keys = [LEASE, *(entry.key for entry in self._store.list(CLAIMS))]
            found = {key: self._store.find(key) for key in keys}
            return {key.removeprefix(f"{CLAIMS}/"): _value(data) for key, data in found.items() if data is not None}
        claims = {}
        for file in Path(self._settings.output, CLAIMS).glob("[!.]*"):
            with suppress(OSError):  # it has just gone, or is another user's
                if is_locked(file):
                    claims[file.name] = _value(file.read_bytes())
        return claims

    def _sent(self) -> Counter[str]:
        """Shards of the output's streams that are there."""
        keys = [entry.key.split("/") for entry in self._store.list()] if self._settings.remote else []
        return Counter(parts[0] for parts in keys if len(parts) == 3 and parts[2].startswith("shard."))


def lines_of(status: BuildStatus) -> list[str]:
    """A status for people."""
    lines = [f"{status.output} {STATES[status.state]}"]
    if status.holder and status.silent is not None:
        lines.append(f"by {status.holder}; its last sign of life was {duration(status.silent)} ago")
    for names, other in status.others.items():
        holder = (
            f", process {other['holder']['pid']} on {one_line(other['holder']['host'])}"
            if other["holder"] and other["state"] != "stopped"
            else ""
        )
        lines.append(f"only={names} {STATES[other['state']]}{holder}")
    known = {name for names in status.others for name in names.split(",")}
    for name, claim in sorted(status.claims.items()):
        if name in known:
            continue
        what = "all streams" if name == LEASE else name
        lines.append(f"{what}: of another builder, on {one_line(claim.get('host', 'a machine that it does not say'))}")
    rows = [_row(name.replace(EVAL, " (eval_sources)"), stream) for name, stream in status.streams.items()]
    heads = ["stream", "parts", "running", "at", "of", "", "rate", "left", "documents", "tokens", "shards"]
    lines += table(heads, rows)
    for name, stream in status.streams.items():
        for kind, counts in (("filtered", stream.filtered), ("rejected", stream.rejected)):
            if counts:
                lines.append(f"{name}: {kind}: {', '.join(f'{count} {why}' for why, count in sorted(counts.items()))}")
    return lines


def _row(name: str, stream: StreamStatus) -> list[str]:
    if stream.unit is None or stream.at is None or stream.total is None or stream.parts is None:
        place = [NONE, NONE, NONE, NONE, stream.state, NONE, NONE]
    else:
        shown = size if stream.unit == "bytes" else lambda number: f"{amount(number)} tok"
        share = percent(stream.at / stream.total) if stream.total else NONE
        place = [f"{stream.parts.done}/{stream.parts.total}", str(stream.parts.running)]
        place += [shown(stream.at), shown(stream.total), share]
        place += [NONE if stream.rate is None else f"{shown(stream.rate)}/s"]
        place += [NONE if stream.left is None else duration(stream.left)]
    return [name, *place, amount(stream.documents), amount(stream.tokens), str(stream.shards)]


def _state(plan: BuildPlan | None, alive: bool, claims: dict[str, Json], streams: dict[str, StreamStatus]) -> str:
    if plan is None:
        if all(stream.state == "finished" for stream in streams.values()):
            return "finished"
        return "planning" if alive else "elsewhere" if claims else "none"
    if not alive:
        return "stopped"
    if plan.clearing:
        return "planning"
    parts = [streams[name].parts for name in plan.streams]
    return "publishing" if all(part and part.done == part.total for part in parts) else "building"


def _alive(holder: Holder, silent: float) -> bool:
    """Whether a builder is at work: its process, or from another machine, its signs of life."""
    if holder.host != os.uname().nodename:
        return silent < PATIENCE
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _value(data: bytes) -> Json:
    with suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if key in ("builder", "host")}
    return {}
