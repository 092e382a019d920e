"""The model card of an export: the mix its weights have seen, and what differs from their base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chimera.text import code, counted, markdown
from chimera.train.export.trained import CHATML, Trained, trained_ends


def card(
    about: Mapping[str, Any],
    state: Mapping[str, Any],
    trained: Trained,
    changes: Sequence[str],
    differing: Sequence[str],
    tokenizer: Any,
) -> str:
    """A model card with what the weights have seen, from the checkpoint's own counts.

    Args:
        about: what the checkpoint keeps of its run.
        state: of the checkpoint.
        trained: the template of the chats.
        changes: what of the base, if there is one, the run changed.
        differing: the files that differ from the base's, and in what.
        tokenizer: of the export, as a user loads it.
    """
    consumed = state["dataset_state"]["train"]["consumed"]
    positions = {name: blocks * about["block_len"] for name, blocks in consumed.items()}
    seen = state["callbacks"].get("Monitor", {}).get("seen", {})
    counted = seen.get("from_step") == 0  # else by a version that did not tell padding apart, at first
    tokens = {name: seen["tokens"].get(name, 0) for name in consumed} if counted else positions
    total, padding = sum(tokens.values()), 1 - sum(tokens.values()) / max(1, sum(positions.values()))
    what = "tokens" if counted else "positions (tokens and padding)"
    rows = [
        f"| {markdown(name)} | {count:,} | {count / max(1, total):.2%} | {source_of(about['sources'].get(name))} |"
        for name, count in tokens.items()
    ]
    step = state["dataset_state"]["train"]["step"]
    return "\n".join(
        [
            f"# {markdown(about['run_name'])}",
            "",
            f"A causal language model after {step:,} steps on {total:,} {what}, trained with Chimera."
            + (f" Besides, {padding:.2%} of the positions were padding." if padding and counted else ""),
            "",
            f"| stream | {'tokens' if counted else 'positions'} seen | share | source |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            _spoken_to(about, trained, [name for name, blocks in consumed.items() if blocks]),
            *_base(about, changes, differing, tokenizer),
            "",
        ]
    )


def _spoken_to(about: Mapping[str, Any], trained: Trained, streams: Sequence[str]) -> str:
    """How a text and a chat were written in training."""
    eos, *turn = trained_ends(about, trained)
    if trained.template is None:
        return f"It was trained on texts alone; documents end with {code(eos)}."
    what = "ChatML" if trained.template == CHATML else "written by its tokenizer's chat template"
    if trained.template.date:
        what += f", on {markdown(trained.template.date)}"
    ends = f"documents end with {code(eos)}" + (f", turns with {code(turn[0])}" if turn else "")
    said = f"The chats it was trained on are {what}; {ends}."
    others = [name for name in streams if name not in trained.streams and about.get("templates", {}).get(name)]
    return said + (f" Those of {markdown(' and '.join(others))} had another template." if others else "")


def _base(about: Mapping[str, Any], changes: Sequence[str], differing: Sequence[str], tokenizer: Any) -> list[str]:
    base = about.get("base")
    if not base:
        return []
    said = "Tokenizer, chat template, special tokens, generation config, context length and weights' type are its own"
    around, trained = tokenizer("").input_ids, about.get("bos", [])
    puts, had = (" and ".join(code(t) for t in tokenizer.convert_ids_to_tokens(ids)) for ids in (around, trained))
    return [
        "",
        f"It goes on from {code(base['name'])}. {said}{', but for:' if changes else '.'}",
        *(["", *(f"- {change}" for change in changes)] if changes else []),
        *(
            ["", f"Its tokenizer puts {puts} around a text; the texts it went on with had {had or 'none'}."]
            if around != trained and None in about.get("templates", {"": None}).values()  # there are texts
            else []
        ),
        *(["", "Of its files these say more than the base's, or something else:", ""] if differing else []),
        *(f"- {difference}" for difference in differing),
    ]


def source_of(source: Any) -> str:
    """A stream's source as the manifest describes it, in a few words and without the names of our folders."""
    described = source.get("describe", "") if isinstance(source, dict) else ""
    if not isinstance(described, dict):  # shards made by others: their folder
        return markdown(described)
    found = []
    if files := [Path(file["path"]).name for file in described.get("files", [])]:
        found.append(f"{counted(len(files), 'local file')}: {', '.join(files[:3])}" + (", …" if len(files) > 3 else ""))
    if texts := described.get("texts"):  # each a document, which the manifest counts and does not name
        found.append(f"{counted(texts['files'], 'text file')} ({texts['bytes']:,} bytes)")
    if found:
        return markdown("; ".join(found))
    which = [described.get(key) for key in ("subset", "data_dir", "split")]
    revision = str(described.get("revision"))[:12]
    return markdown(f"{described.get('hub')} ({', '.join(filter(None, which))}) at {revision}")
