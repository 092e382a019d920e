"""What a checkpoint's chats were written with: their template, the tokens that it names, what ends turns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chimera.chatml import CHAT_TEMPLATE, IM_END
from chimera.cli import UserError
from chimera.manifest import ChatTemplate

CHATML = ChatTemplate(digest="", texts={"default": CHAT_TEMPLATE}, tokens={}, date=None, control=[], turn_end=IM_END)


@dataclass(frozen=True)
class Trained:
    """The template of the chats, and the streams that have it. None of them: only texts were trained on."""

    template: ChatTemplate | None
    streams: Sequence[str]

    @property
    def text(self) -> str | None:
        """The template's text that renders a conversation without tools."""
        return self.template.texts["default"] if self.template else None

    @property
    def named(self) -> dict[str, str]:
        """The special tokens that the template writes by name, such as `bos_token`."""
        if self.template is None:
            return {}
        texts = self.template.texts.values()
        return {key: token for key, token in self.template.tokens.items() if any(key in text for text in texts)}


def trained_template(about: Mapping[str, Any], streams: Sequence[str], speaks: str | None = None) -> Trained:
    """The chat template that `streams` were written with; of several the one of the stream `speaks`.

    Checkpoints of before kept no templates: with them it is ChatML, as it was. Raises `UserError` where there are
    several and none is named.
    """
    known = about.get("templates", dict.fromkeys(about["sources"], CHAT_TEMPLATE))
    found: dict[str, tuple[ChatTemplate, list[str]]] = {}
    for name in streams:
        if kept := known.get(name):
            template = CHATML if isinstance(kept, str) else ChatTemplate.model_validate(kept)
            said = json.dumps([template.texts, template.tokens], sort_keys=True)
            found.setdefault(said, (template, []))[1].append(name)
    if speaks is not None:
        found = {said: held for said, held in found.items() if speaks in held[1]}
        if not found:
            raise UserError(f"--template {speaks}: no chats of a stream of that name were trained on")
    if len(found) > 1:
        names = ", ".join(held[1][0] for held in found.values())
        raise UserError(
            "the chats trained on have more than one template, and an export speaks one alone: give `--template "
            f"STREAM` with the stream whose template it takes (one of {names})"
        )
    return Trained(*next(iter(found.values()), (None, ())))


def trained_ends(about: Mapping[str, Any], trained: Trained) -> list[str]:
    """The tokens that what was trained on ends with: documents', then turns'."""
    turn = trained.template.turn_end if trained.template else None
    return [about["eos_token"], *([turn] if turn and turn != about["eos_token"] else [])]
