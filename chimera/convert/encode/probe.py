"""What a chat template writes, learned from a conversation of its own before any row is rendered.

Two turns of plain words show which tokens head and end turns, and whether one of them is the EOS or the pad token,
which the shards need for themselves.
"""

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from chimera.cli import UserError, say
from chimera.convert.encode.chats import ChatRenderer
from chimera.convert.encode.control import ControlTokens
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.template import Message, Renderer, read_template
from chimera.convert.encode.texts import Reject
from chimera.manifest import ChatTemplate

if TYPE_CHECKING:
    from chimera.convert.settings import BuildSettings
    from chimera.convert.stream_settings import StreamSettings

_WORDS = ("alfa", "bravo", "charlie", "delta", "echo")
_TURNS = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, _WORDS[1:], strict=True)]
_SYSTEM = {"role": "system", "content": _WORDS[0]}


def chats_of(settings: "BuildSettings", template: ChatTemplate, encoder: Encoder) -> ChatRenderer:
    """What renders the conversations of a stream with this template."""
    named = settings.tokenizer.eos_token, settings.tokenizer.pad_token
    return ChatRenderer(Renderer(template), encoder.control_tokens(), *named)


def probed(name: str, stream: "StreamSettings", settings: "BuildSettings", encoder: Encoder) -> ChatTemplate | None:
    """The stream's template with all that is to be known of it; `None` for ChatML and for texts.

    Raises `UserError` where it cannot be trained on: nothing ends an answer, or what ends documents stands inside.
    """
    if stream.format != "chat":
        return None
    where = f"streams.{name}"
    template = read_template(stream, settings.tokenizer, where)
    if any("strftime_now" in text for text in template.texts.values()):
        template = template.model_copy(update={"date": stream.date or date.today().isoformat()})
    renderer = Renderer(template)
    shown = [text for turns in (_TURNS, [_SYSTEM, *_TURNS]) if (text := _rendering(renderer, turns)) is not None]
    if not shown:
        raise UserError(f"{where}: its chat template renders no conversation of two turns ({renderer.error})")
    text = shown[0]
    if stream.control_tokens == "auto":
        plain = [token for token in encoder.plain_tokens if any(map(str.isalpha, token))]
        control = sorted({token for token in plain for text in shown if token in _around(renderer, text)})
    else:
        control = sorted({*stream.control_tokens} - encoder.special_ids.keys())
        if unknown := sorted({*control} - {*encoder.plain_tokens}):
            raise UserError(f"{where}.control_tokens: {unknown[0]!r} is no added token of the tokenizer")
    template = template.model_copy(update={"control": control})
    _warn_of_learned_headers(name, renderer)
    tokens = encoder.with_control(control).control_tokens()
    turn_end, inside = _turn_end(where, text, tokens), _eos_inside(where, text, tokens, settings)
    if inside:
        say(f"{name}: its template ends turns with {settings.tokenizer.eos_token!r}: where documents start is stored")
    return template.model_copy(update={"turn_end": turn_end, "eos_inside": inside})


def _rendering(renderer: Renderer, turns: Sequence[Message]) -> str | None:
    try:
        text = renderer.render(turns)
    except Reject:
        return None
    return text if all(turn["content"] in text for turn in turns) else None


def _around(renderer: Renderer, text: str) -> str:
    """What of a rendering heads and ends turns, without what a model writes of its answer (`<think>`, say)."""
    prompt = renderer.render_or_none(_TURNS[:1], prompt=True) or ""
    return "\n".join((prompt, text.partition(_WORDS[2])[2].partition(_WORDS[3])[0], text.rpartition(_WORDS[4])[2]))


def _warn_of_learned_headers(name: str, renderer: Renderer) -> None:
    """Say so where the template has no prompt of its own, so that what heads an answer is learned with it."""
    prompt, plain = (renderer.render_or_none(_TURNS[:1], prompt=flag) for flag in (True, False))
    whole = renderer.render_or_none(_TURNS[:2])
    if not prompt or prompt != plain or not whole or not whole.startswith(prompt):
        return
    if head := whole[len(prompt) :].partition(_WORDS[2])[0].strip():
        say(
            f"{name}: warning: its chat template does nothing for `add_generation_prompt`: what heads an answer "
            f"({head!r}) is learned with it, and a server does not write it"
        )


def _turn_end(where: str, text: str, tokens: ControlTokens) -> str | None:
    """The last control token behind both an earlier and the last answer, if there is one."""
    earlier = text.partition(_WORDS[2])[2].partition(_WORDS[3])[0]
    last = text.rpartition(_WORDS[4])[2]
    found = [one.token for one in tokens.find(last)]
    if not found:
        raise UserError(
            f"{where}: its chat template ends an answer with {last!r}, in which there is no special token, so that a "
            "model would learn no end of its answers: use a template that writes one, name it in `control_tokens`, or "
            "add it where the tokenizer lacks it (`tokenizer.add_tokens`)"
        )
    before = {one.token for one in tokens.find(earlier)}
    return next((token for token in reversed(found) if token in before), None)


def _eos_inside(where: str, text: str, tokens: ControlTokens, settings: "BuildSettings") -> bool:
    """Whether a template writes inside of conversations what ends documents; refuse what fills blocks there."""
    eos, pad = settings.tokenizer.eos_token, settings.tokenizer.pad_token
    found = tokens.find(text)
    written = [one.token for one in found]
    if pad in written:
        raise UserError(
            f"{where}: its chat template writes {pad!r} inside of conversations, and as tokenizer.pad_token it fills "
            "blocks: name another special token, or add one (`pad_token: {add: <|pad|>}`)"
        )
    if pad is None and found and found[0] == (0, len(eos), eos):
        raise UserError(
            f"{where}: its chat template begins a conversation with {eos!r}, which without a pad token fills blocks: "
            "name one, or add one (`pad_token: {add: <|pad|>}`)"
        )
    return eos in written[:-1]
