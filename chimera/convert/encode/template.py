"""A chat template: from the tokenizer's folder or a file, compiled once in the sandbox of `transformers`, rendered."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.cli import UserError
from chimera.convert.encode.texts import Reject
from chimera.manifest import ChatTemplate
from chimera.text import one_line
from chimera.tokenizer_file import FILES, file_of, read_json, with_tokens

if TYPE_CHECKING:
    from chimera.convert.settings import BuildSettings, TokenizerSettings
    from chimera.convert.stream_settings import StreamSettings

Message = dict[str, Any]
_GENERATION = re.compile(r"{%[-+]?\s*generation\b")
LARGE = 1 << 26  # bytes: a file beside a tokenizer that is no part of it, such as a model's weights


class Renderer:
    """Renders conversations as `apply_chat_template` does, on the template's day. Compiled when first needed."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.error = ""  # the last of the template's own

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, prompt: bool = False) -> str:
        """The text of a conversation; `prompt`: as generation begins behind it. Raises `Reject`."""
        try:
            compiled, known = self._tool_use if tools and "tool_use" in self.template.texts else self._default
            # As `compiled.render`, which looks through its globals each time: that takes longer than the rest.
            given = {**known, "messages": messages, "tools": tools or None, "add_generation_prompt": prompt}
            context = compiled.environment.context_class(compiled.environment, given, compiled.name, compiled.blocks)
            return "".join(compiled.root_render_func(context))
        except Exception as error:  # a template is a program of its own: it may raise anything
            self.error = one_line(error)[:200]
            raise Reject("template_error") from None

    def render_or_none(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, prompt: bool = False
    ) -> str | None:
        """The same, `None` where the template refuses the conversation."""
        try:
            return self.render(messages, tools, prompt)
        except Reject:
            return None

    def generated(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[tuple[int, int]] | None:
        """Where the rendering has what stands in `{% generation %}` blocks; `None`: the template has none."""
        texts = self.template.texts
        if not _GENERATION.search(texts["tool_use" if tools and "tool_use" in texts else "default"]):
            return None
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        options = {"tools": tools or None, "documents": None, "add_generation_prompt": False, **self.template.tokens}
        return list(_render_with_assistant_indices(self.compiled(tools), messages, **options)[1])

    def compiled(self, tools: object) -> Any:
        """The template for a conversation with or without tools, its date frozen."""
        texts = self.template.texts
        found, _ = self._tool_use if tools and "tool_use" in texts else self._default
        found.environment.globals["strftime_now"] = self._now  # which `transformers` shares between equal texts
        return found

    @cached_property
    def _default(self) -> tuple[Any, dict[str, Any]]:
        return self._with_known("default")

    @cached_property
    def _tool_use(self) -> tuple[Any, dict[str, Any]]:
        return self._with_known("tool_use")

    def _with_known(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A template compiled, and what it knows of any conversation."""
        compiled = _compiled(self.template.texts[name])
        return compiled, {**compiled.globals, "strftime_now": self._now, "documents": None, **self.template.tokens}

    def _now(self, form: str) -> str:
        return datetime.fromisoformat(self.template.date or "2026-01-01").strftime(form)


def _compiled(text: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    found = _compile_jinja_template(text)
    found.environment.getattr = partial(_attribute, type(found.environment).getattr, found.environment)
    return found


def _attribute(sandboxed: Any, environment: Any, of: Any, name: str) -> Any:
    """What the sandbox gives for `message.content`, without its failing first to find an attribute of that name."""
    if type(of) is dict and name in of and not hasattr(dict, name):
        return of[name]
    return sandboxed(environment, of, name)


def read_template(stream: "StreamSettings", tokenizer: "TokenizerSettings", where: str) -> ChatTemplate:
    """A stream's template, its date and control tokens yet to be found. Raises `UserError` where there is none."""
    if stream.template == "tokenizer":
        texts = _named(loaded_tokenizer(tokenizer).chat_template)
        if "default" not in texts:
            raise UserError(
                f"{where}: the tokenizer {tokenizer.path} has no template (chat_template.jinja, or `chat_template` "
                "in tokenizer_config.json): add it, or set `template` to chatml or the path of a .jinja file"
            )
    else:
        try:
            texts = {"default": Path(stream.template).read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: template {stream.template} cannot be read: {one_line(error)}") from None
    try:
        for text in texts.values():
            _compiled(text)
    except Exception as error:  # jinja2's
        raise UserError(
            f"{where}: the chat template is not one that transformers compiles: {one_line(error)}"
        ) from None
    loaded = loaded_tokenizer(tokenizer)
    tokens = {key: value for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    digest = hashlib.sha256(json.dumps([texts, tokens], sort_keys=True).encode()).hexdigest()
    return ChatTemplate(digest=digest, texts=texts, tokens=tokens, date=None, control=[], turn_end=None)


def changed_templates(streams: Mapping[str, Any], settings: "BuildSettings") -> list[str]:
    """The streams of a plan or a manifest whose template is another one now."""
    found = []
    for name, stream in streams.items():
        if stream.template is not None:
            now = read_template(settings.streams[name], settings.tokenizer, f"streams.{name}").digest
            if now != stream.template.digest:
                found.append(f"streams.{name}: chat template: {stream.template.digest[:12]} -> {now[:12]}")
    return found


def loaded_tokenizer(settings: "TokenizerSettings") -> Any:
    """The tokenizer as its user loads it with `transformers`, and with `add_tokens`.

    One without a tokenizer_config.json beside it has `eos_token` and `pad_token` alone. Raises `UserError` where
    transformers does not load it.
    """
    with file_of(settings.path) as file:
        raw = read_json(file)
        files = {"tokenizer.json": with_tokens(raw, settings.add_tokens) if settings.add_tokens else raw}
        if file.name in FILES:
            for path in [*file.parent.glob("*"), *file.parent.glob("additional_chat_templates/*.jinja")]:
                if path.is_file() and path.stat().st_size < LARGE:
                    files.setdefault(str(path.relative_to(file.parent)), path.read_bytes())
    return _loaded(tuple(sorted(files.items())), settings.path, settings.eos_token, settings.pad_token)


@lru_cache(maxsize=2)
def _loaded(files: tuple[tuple[str, bytes], ...], path: str, eos_token: str, pad_token: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix="chimera-tokenizer-") as scratch:
        for name, data in files:
            file = Path(scratch, name)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        try:
            if Path(scratch, "tokenizer_config.json").exists():
                return AutoTokenizer.from_pretrained(scratch, local_files_only=True)
            named = {"eos_token": eos_token, **({"pad_token": pad_token} if pad_token else {})}
            return PreTrainedTokenizerFast(tokenizer_file=f"{scratch}/tokenizer.json", **named)
        except Exception as error:  # whatever its classes raise
            raise UserError(
                f"tokenizer.path: {path} cannot be loaded by transformers: {one_line(error)[:200]}"
            ) from None


def _named(template: object) -> dict[str, str]:
    """The texts of a tokenizer's template by name."""
    if isinstance(template, dict):
        return {str(name): str(text) for name, text in template.items()}
    return {} if template is None else {"default": str(template)}
