"""A build from its settings to its manifest: what is there already, the plan, the parts, their publication.

Killed at any moment, the same command goes on: `plan.json` in the work folder says that a build has begun, the states
of its parts how far it is, and the manifest in the output that it is whole.
"""

import shutil
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from chimera.cli import UserError, say
from chimera.convert.build import part_state
from chimera.convert.build.claims import just_changed, terms_of
from chimera.convert.build.dispatch import Dispatcher
from chimera.convert.build.executor import Executor, LocalExecutor
from chimera.convert.build.finished import CHECKED, check_small_files, summary
from chimera.convert.build.growth import (
    being_removed,
    end_removal,
    is_published,
    missing,
    refusal,
    remove_streams,
    say_what_is_left_aside,
    shared,
    unnamed,
)
from chimera.convert.build.outputs import Output, manifest_of, open_output
from chimera.convert.build.part_lock import left_alone
from chimera.convert.build.part_state import EVAL
from chimera.convert.build.plan import PARTS, BuildPlan, load_plan, planned_settings, text_bos
from chimera.convert.build.planner import make_plan
from chimera.convert.build.publish import publish
from chimera.convert.build.ray_executor import RayExecutor
from chimera.convert.build.work_lock import Locked, empty, holder_of, lock_of
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.template import changed_templates
from chimera.convert.read.sources import added_files, changed_files, gone_files
from chimera.convert.settings import BuildSettings, differences, identity, running_settings
from chimera.files import write_whole
from chimera.manifest import Manifest, Source, Stream
from chimera.text import one_line


def build(settings: BuildSettings, executor: Executor) -> Manifest:
    """Plan, convert, publish, all under the lock of the output; returns its manifest.

    Raises `UserError` for a mistake of the user's, `OSError` for the disk.
    """
    work, output = settings.work_folder, open_output(settings)
    begun = (work / "plan.json").exists()  # with a tokenizer that was proven: to compare with it needs no proof
    encoder = Encoder.from_settings(settings.tokenizer, "tokenizers" if begun else None)
    if not settings.remote and not work.exists():
        found = look(settings, work, output, encoder)
        if found.whole and not found.gone:
            return found.whole  # which needs no permission to write there
    terms = terms_of(settings, encoder)
    with lock_of(work, many=settings.engine == "array") as free:
        if not free:
            holder = holder_of(work)
            who = f" ({holder})" if holder else ""
            raise Locked(f"another builder is writing {settings.output}{who}: wait for it or stop it")
        names = streams_of(settings, work, output)
        with output.lock(names, terms):
            if gone := being_removed(work):  # by a build that a kill has ended
                output.acquire(work, gone, terms, settings.rebuild)
                end_removal(work, output)
                if not (work / "plan.json").exists():
                    output.release()
            try:
                found = look(settings, work, output, encoder)
                if found.whole or found.published:
                    if (work / "plan.json").exists():
                        output.release()
                    empty(work)
                if found.whole and not found.gone:
                    return found.whole
                if begun and found.state is not State.RESUMING:
                    encoder = Encoder.from_settings(settings.tokenizer)
                plan = None if found.whole else begin(found, work, output, encoder)
            except BaseException:
                if not (work / "plan.json").exists():
                    empty(work)  # nothing has begun
                raise
            building = {*found.settings.streams} if plan else set()
            claims = {*found.gone, *building, *(plan.clearing if plan else ())}
            try:
                output.acquire(work, claims, terms, settings.rebuild)
            except UserError:
                if found.state is State.NEW:
                    empty(work)  # nothing has begun
                raise
            if found.state is State.NEW:
                say_what_is_left_aside(found.settings, work)
            manifest = replace_older(found, work, output)
            if plan is None or (manifest and building & manifest.streams.keys()):
                output.release()
                empty(work)
                if plan or not manifest:
                    raise just_changed(output.name)
                return manifest
            plan = cleared(plan, work, output, manifest)
            with executor:
                parts = Dispatcher(plan.streams, work, settings.stall_after).run(executor)
            manifest = publish(plan, parts, work, output)
            empty(work)
    if settings.streams.keys() - manifest.streams.keys():
        raise just_changed(output.name)
    for name, stream in manifest.streams.items():
        if name in found.settings.streams:
            say(f"{name}: {summary(stream, settings.streams[name].max_tokens)}")
    return manifest


def streams_of(settings: BuildSettings, work: Path, output: Output) -> set[str]:
    """The streams that a build may write or remove."""
    manifest = manifest_of(output)
    there = {*manifest.streams} if manifest else set()
    names = {*settings.streams, *there} if settings.rebuild else {*settings.streams} - there
    if (work / "plan.json").exists():
        plan = load_plan(work)
        names |= {*plan.clearing, *plan.build_settings.streams} if settings.rebuild else {*plan.clearing} - there
    return names | {*being_removed(work)}


def executor_for(settings: BuildSettings) -> Executor:
    """The executor that the settings name."""
    if settings.engine == "ray":
        return RayExecutor(settings, settings.work_folder)
    return LocalExecutor(settings.worker_count, settings.work_folder)


class State(Enum):
    NEW = "nothing is there that this build may replace"
    RESUMING = "the work folder holds this build, unfinished"
    REPLACING = "what is there of other builds is removed first, as `rebuild` says"
    FINISHED = "the output is this build, whole"


@dataclass(frozen=True)
class Found:
    """What a build begins with: the manifest of its output and the plan in its work folder, where they matter.

    `settings` are of the streams that it builds: all, or those that the finished output of `base` has not yet; `gone`
    are its streams that go, as `rebuild` says. The plan may be `published` by then: only its work folder is left.
    """

    state: State
    manifest: Manifest | None
    plan: BuildPlan | None
    settings: BuildSettings
    base: Manifest | None = None
    gone: tuple[str, ...] = ()
    published: bool = False

    @property
    def whole(self) -> Manifest | None:
        return self.manifest if self.state is State.FINISHED else None


def look(settings: BuildSettings, work: Path, output: Output, encoder: Encoder) -> Found:
    """What the output and the work folder are to a build with these settings.

    Raises `UserError` with the difference where they have other settings, another tokenizer (`encoder` has that of the
    settings) or other files, unless `rebuild` lets them go.
    """
    manifest, base = manifest_of(output), None
    gone: tuple[str, ...] = ()
    if manifest is not None:
        common = shared(manifest, settings, encoder)
        if common and not changes(*common, encoder):
            check_small_files(manifest, output)
            base, gone, settings = manifest, unnamed(manifest, settings), missing(manifest, settings)
            if not settings.streams:
                todo = f"nothing {'more to build' if gone else 'to do'}"
                say(f"{settings.output} is finished: {todo} ({CHECKED.format(one_line(settings.output))})")
                return Found(State.FINISHED, manifest, None, settings, base, gone)
            manifest = None
        elif not settings.rebuild:
            raise UserError(refusal(settings.output, changes(*(common or (manifest, settings)), encoder)))
    plan = load_plan(work) if (work / "plan.json").exists() else None
    if plan is not None and base is not None and is_published(plan, base):
        return Found(State.NEW, None, None, settings, base, gone, published=True)
    if plan is not None:
        plan = plan.without(base.streams if base else ())
        changed = changes(plan, settings, encoder)
        if changed and not settings.rebuild:
            raise UserError(refusal(f"the unfinished build in {work}", changed))
        if settings.rebuild:  # without it files that are gone are waited for, where they are not read yet
            changed += [file for stream in plan.streams.values() for file in gone_files(stream.source.describe)]
        if not changed and manifest is None:  # or another build was published since, in the place of this one
            say(f"going on with the unfinished build in {work}")
            return Found(State.RESUMING, None, plan, settings, base, gone)
    return Found(State.REPLACING if settings.rebuild else State.NEW, manifest, plan, settings, base, gone)


def begin(found: Found, work: Path, output: Output, encoder: Encoder) -> BuildPlan:
    """The plan to go by, written to the work folder. Raises `UserError` where there is no room for a new build."""
    settings = found.settings
    if found.state is State.RESUMING:
        assert found.plan is not None
        plan = replace(found.plan, running=running_settings(settings))  # how it runs may change at any time
        if plan != found.plan:
            plan.write(work)
        return plan
    older = {*(found.manifest.streams if found.manifest else ())}
    if found.plan:
        older |= {*found.plan.streams, *found.plan.clearing}
    if found.base:
        older -= found.base.streams.keys()
        say(f"{output.name} stays as it is, and beside it {' and '.join(settings.streams)} will be built")
    plan = make_plan(settings, work, older, encoder)  # first: nothing is removed for sources that do not open
    output.check_free(plan.clearing, settings.rebuild, finished=found.base is not None)
    write_whole(work / "tokenizer.json", encoder.raw)
    plan.write(work)
    return plan


def replace_older(found: Found, work: Path, output: Output) -> Manifest | None:
    """Let go what the output holds that is to go; returns the manifest that is left.

    Raises `UserError` where it is not what was found any more.
    """
    if found.state is State.REPLACING and found.manifest:
        output.remove_manifest(found.manifest)
    return remove_streams(found.gone, work, output) if found.gone else manifest_of(output)


def cleared(plan: BuildPlan, work: Path, output: Output, manifest: Manifest | None) -> BuildPlan:
    """The plan once what it replaces is removed, but for what `manifest` names. Until then it names those streams."""
    if not plan.clearing:
        return plan
    kept = manifest.streams if manifest else {}
    output.clear([name for name in plan.clearing if name not in kept])
    for parts in work.glob(f"{PARTS}*"):
        for folder in [path for path in parts.glob("*/*") if path.is_dir()]:
            if folder.parent.name.removesuffix(EVAL) in kept:
                continue
            with left_alone(folder):
                for key in part_state.all_shard_keys(folder.parent.name, part_state.load(folder)):
                    output.delete_shard(key)
        shutil.rmtree(parts)
    plan = replace(plan, clearing=[])
    plan.write(work)
    return plan


def changes(old: Manifest | BuildPlan, settings: BuildSettings, encoder: Encoder) -> list[str]:
    """How settings, tokenizer and local files differ from those of a plan or a manifest."""
    found = differences(old.settings, identity(settings))
    if old.tokenizer.digest != encoder.digest:
        found.append(f"tokenizer: {old.tokenizer.digest[:12]} -> {encoder.digest[:12]}")
    elif old.tokenizer.bos != (bos := text_bos(settings, encoder)):  # of builds before there was a choice: none
        way = "" if old.tokenizer.bos else ", as `tokenizer.bos: never` has it"
        found.append(f"what texts begin with: ids {old.tokenizer.bos}{way} -> {bos}")
    if not found:
        found += changed_templates({name: old.streams[name] for name in settings.streams}, settings)
    for name, source in _sources(old).items():
        found += [f"the size of {file}" for file in changed_files(source.describe)]
        if not found:
            now = planned_settings(settings.streams, name)[0].sources[source.index]
            added = added_files(source.describe, now, settings)
            found += [f"streams.{name} has {file} now, which can be a stream of its own" for file in added]
    return found


def _sources(old: Manifest | BuildPlan) -> dict[str, Source]:
    """The sources of streams and of their own validation sets, by their names in a plan."""
    found = {name: stream.source for name, stream in old.streams.items()}
    for name, stream in old.streams.items():
        if isinstance(stream, Stream) and stream.eval_source:
            found[f"{name}{EVAL}"] = stream.eval_source
    return {name: source for name, source in found.items() if isinstance(source.describe, dict)}
