"""A finished output whose config names other streams now: new ones are built beside the others, which stay as they are.

Until the last step the manifest names the old streams alone, so whoever reads the output sees it whole; then one write
replaces it. Streams that the config names no more are kept. Other builders may build other streams meanwhile: whoever
publishes adds its own to those that the manifest names by then.
"""

import json
import re
from contextlib import suppress
from pathlib import Path

from chimera.cli import UserError, say
from chimera.convert.build.claims import just_changed
from chimera.convert.build.outputs import Output, manifest_of, update_manifest
from chimera.convert.build.part_state import EVAL
from chimera.convert.build.plan import BuildPlan, load_plan
from chimera.convert.encode.encoding import Encoder
from chimera.convert.settings import WORK, BuildSettings, differences
from chimera.files import write_whole
from chimera.manifest import NAME, Manifest, Stream

GONE = "gone.json"  # in the work folder: streams that are being removed

OF_FILES = re.compile(r"streams\.[^.]+\.(eval_)?sources\.\d+\.files")  # a change that `differences` names


def shared(manifest: Manifest, settings: BuildSettings, encoder: Encoder) -> tuple[Manifest, BuildSettings] | None:
    """An output and a config as far as both name the same streams; `None` where one cannot become the other.

    What texts begin with is the output's, not a stream's: `None` where that would differ for a new one. So it is where
    they have no stream in common and `rebuild` says that the output is to be as the config.
    """
    names = [name for name in settings.streams if name in manifest.streams]
    texts = any(stream.format == "text" for stream in manifest.streams.values())
    more = any(stream.format == "text" for name, stream in settings.streams.items() if name not in names)
    if (settings.rebuild and not names) or (texts and more and manifest.tokenizer.bos != list(encoder.bos)):
        return None
    found = restricted(manifest, names)
    return found, only(settings, names)


def only(settings: BuildSettings, names: list[str]) -> BuildSettings:
    """The settings of some of their streams."""
    named = [name for name in settings.only if name in names]
    return settings.model_copy(update={"streams": {name: settings.streams[name] for name in names}, "only": named})


def missing(manifest: Manifest, settings: BuildSettings) -> BuildSettings:
    """The settings of the streams that an output has not yet."""
    return only(settings, [name for name in settings.streams if name not in manifest.streams])


def unnamed(manifest: Manifest, settings: BuildSettings) -> tuple[str, ...]:
    """The streams of an output that are to go: those that the settings do not name, under `rebuild`; said otherwise."""
    if settings.only:
        return ()
    gone = tuple(sorted(manifest.streams.keys() - settings.streams.keys()))
    if gone and not settings.rebuild:
        say(
            f"{settings.output} also holds {' and '.join(gone)}, which the config does not name: kept; `rebuild=true` "
            "removes it"
        )
        return ()
    return gone


def remove_streams(gone: tuple[str, ...], work: Path, output: Output) -> Manifest:
    """Remove streams of a finished output; returns the manifest without them, which is written first."""

    def without(found: Manifest | None) -> Manifest:
        if found is None:
            raise just_changed(output.name)
        return restricted(found, [name for name in found.streams if name not in gone])

    write_whole(work / GONE, json.dumps(gone).encode())
    kept = update_manifest(output, without)
    say(f"{output.name}: {' and '.join(gone)} removed")
    end_removal(work, output)
    return kept


def end_removal(work: Path, output: Output) -> None:
    """Remove the streams that a manifest no longer names, also those that a kill left halfway."""
    if (work / GONE).exists():
        manifest = manifest_of(output)
        gone = being_removed(work)
        if manifest is not None and not manifest.streams.keys() & {*gone}:
            output.clear(gone)
        (work / GONE).unlink()


def being_removed(work: Path) -> list[str]:
    """The streams that a removal was at, which a kill ended. Raises `UserError` where their list is damaged."""
    file = work / GONE
    if not file.exists():
        return []
    with suppress(ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        if isinstance(found, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in found):
            return found
    raise UserError(f"{file} is damaged: remove it, and of the output the folders of streams that its manifest lacks")


def restricted(manifest: Manifest, names: list[str]) -> Manifest:
    """A manifest of some of its streams, as their build alone would have written it."""
    streams = {name: manifest.streams[name] for name in names}
    texts = any(stream.format == "text" for stream in streams.values())
    update = {
        "format": 2 if any(stream.starts for stream in streams.values()) else 1,
        "tokenizer": manifest.tokenizer if texts else manifest.tokenizer.model_copy(update={"bos": []}),
        "streams": streams,
        "settings": {**manifest.settings, "streams": {name: manifest.settings["streams"][name] for name in names}},
    }
    return manifest.model_copy(update=update)


def is_published(plan: BuildPlan, base: Manifest) -> bool:
    """Whether what a work folder holds was published to the last, and a kill left the folder."""
    return not plan.clearing and {name.removesuffix(EVAL) for name in plan.streams} <= base.streams.keys()


def merged(base: Manifest | None, built: Manifest, output: Output) -> Manifest:
    """The manifest of an output with the streams of both; `built` holds the new ones.

    Raises `UserError` where the output has one of them already, or others on other terms.
    """
    if base is None:
        return built
    if any(base.streams[name] != built.streams[name] for name in base.streams.keys() & built.streams.keys()):
        raise just_changed(output.name)
    texts, more = (any(stream.format == "text" for stream in each.streams.values()) for each in (base, built))
    found = differences({**base.settings, "streams": {}}, {**built.settings, "streams": {}})
    if base.tokenizer.digest != built.tokenizer.digest:
        found.append(f"tokenizer: {base.tokenizer.digest[:12]} -> {built.tokenizer.digest[:12]}")
    if texts and more and base.tokenizer.bos != built.tokenizer.bos:
        found.append(f"what texts begin with: ids {base.tokenizer.bos} -> {built.tokenizer.bos}")
    if found:
        raise UserError(
            f"another builder has finished {output.name} with other settings meanwhile ({'; '.join(found[:5])}): "
            "choose another `output`, or take the change back"
        )
    streams: dict[str, Stream] = {**base.streams, **built.streams}
    settings = {**built.settings, "streams": {**base.settings["streams"], **built.settings["streams"]}}
    update = {
        "format": max(base.format, built.format),
        "tokenizer": base.tokenizer if texts else built.tokenizer,
        "streams": streams,
        "settings": settings,
    }
    return built.model_copy(update=update)


def refusal(what: str, changed: list[str]) -> str:
    """The sentence for an output that was built otherwise."""
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    line = (
        f"{what} was built with other settings ({'; '.join(changed[:5])}{more}): choose another `output`, take the "
        "change back, or set `rebuild=true` to replace it"
    )
    if any(OF_FILES.match(change) for change in changed):
        line += "; files that are to be added can be a stream of their own beside those that are there"
    return line


def say_what_is_left_aside(settings: BuildSettings, work: Path) -> None:
    """Say which streams of a new build lie unfinished in the work folder of another choice of streams (`only`)."""
    if settings.remote or settings.work is not None:
        return
    for file in sorted(Path(settings.output).absolute().glob(f"{WORK}*/plan.json")):
        with suppress(FileNotFoundError):  # its builder has just ended
            names = [name for name in settings.streams if name in load_plan(file.parent).streams]
            if file.parent != work and names:
                say(
                    f"warning: {', '.join(names)} begins anew: the unfinished work in {file.parent} is of another "
                    "choice of streams, and goes on by the command that began it (`only`)"
                )
