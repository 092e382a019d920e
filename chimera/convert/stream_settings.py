"""Typed settings of the streams in `shards.yaml`, and of their sources."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from chimera.config import Place, Settings

Packing = Literal["concat", "best_fit", "none"]
PACKINGS = get_args(Packing)
Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = get_args(Role)
Name = Annotated[str, Field(min_length=1)]
USUAL: dict[str, Any] = {  # of conversations
    **{"messages": "auto", "roles": {}, "too_long": "cut", "turns": "all"},
    **{"template": "chatml", "control_tokens": "auto", "date": None},
}


class SourceSettings(Settings):
    """A hub set, or local files."""

    hub: str | None = Field(None, description="a hub set, `owner/name`")
    subset: str | None = Field(None, description="of the hub set: its subset, as `load_dataset` takes it")
    data_dir: str | None = Field(None, description="of the hub set: the folder to read alone")
    split: str = Field("train", description="of the hub set: its split")
    revision: str | None = Field(None, description="of the hub set: a commit, branch or tag")
    column: Name | Annotated[list[Name], Field(min_length=1)] = Field(
        "text", description="the key of the text: a name, a nested one (`doc.text`), or a list, joined by a blank line"
    )
    files: list[Annotated[Place, Field(min_length=1)]] = Field([], description="paths and globs of local files")

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceSettings":
        if bool(self.hub) == bool(self.files):
            raise ValueError("give either `hub` or `files`")
        if self.files and self != SourceSettings.model_construct(files=self.files, column=self.column):
            raise ValueError("`subset`, `data_dir`, `split` and `revision` are for `hub`; files have none")
        return self


class MessageKeys(Settings):
    """The names that rows have for their messages."""

    list: Name = Field(description="the list of messages")
    role: Name | None = Field(None, description="in a message: who speaks; null: one of the usual names")
    content: Name | None = Field(None, description="in a message: what is said; null: one of the usual names")


class StreamSettings(Settings):
    format: Literal["text", "chat", "chatml"] = Field(
        "text", description="what a row is: a text, or a conversation; chatml: chat with `template: chatml`"
    )
    template: Name = Field(
        "chatml", description="chat: chatml; tokenizer: the chat template of the tokenizer's folder; or a .jinja file"
    )
    turns: Literal["all", "each"] = Field(
        "all", description="chat: all: a conversation is a document; each: each of its answers, with what is before it"
    )
    control_tokens: Literal["auto"] | list[Name] = Field(
        "auto",
        description="chat: added tokens never found in contents; auto: special ones, and what ends or heads turns",
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = Field(
        None, description="chat: the day that a template may write, as 2026-01-31; null: that of the build's beginning"
    )
    packing: Packing = Field(
        "concat", description="concat: one after another; best_fit: none is cut that fits; none: one a block"
    )
    min_chars: int | None = Field(50, ge=0, description="text: characters of a document, at least; null: any number")
    min_tokens: int = Field(10, ge=0, description="tokens of a document, at least; without BOS and EOS")
    messages: Literal["auto"] | MessageKeys = Field(
        "auto", description="chat: where a row has its messages; auto: in one of the usual shapes"
    )
    roles: dict[str, Role] = Field({}, description="chat: more names for roles, such as `{chatgpt: assistant}`")
    too_long: Literal["cut", "drop", "turns"] = Field(
        "cut", description="chat: longer than a block. cut it; drop it; turns: end it with its last turn that fits"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="of the train split, without padding; the document that reaches it is the last"
    )
    eval_sources: list[SourceSettings] = Field(
        [], description="a validation set of its own, as `sources`; then `eval_fraction` leaves this stream alone"
    )
    eval_overlap: Literal["keep", "remove"] = Field(
        "keep", description="rows of `sources` whose text is in `eval_sources`: keep, counted; remove from training"
    )
    sources: list[SourceSettings] = Field(
        [], description="`{hub: ...}` or `{files: [...]}`; the first that opens; none: for evaluation alone"
    )

    @field_validator("sources")
    @classmethod
    def _sources(cls, sources: list[SourceSettings], info: ValidationInfo) -> list[SourceSettings]:
        if not sources and not info.data.get("eval_sources"):
            raise PydanticCustomError("too_short", "no source")
        return sources

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, given: Any) -> Any:
        try:
            return given if given == "auto" else MessageKeys.model_validate(given)
        except ValidationError:
            raise ValueError("auto, or {list: ..., role: ..., content: ...} with the names in your rows") from None

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        if template not in ("chatml", "tokenizer") and not template.endswith(".jinja"):
            raise ValueError("chatml, tokenizer (the template in the tokenizer's folder) or the path of a .jinja file")
        return template

    @model_validator(mode="after")
    def _conversations(self) -> "StreamSettings":
        if self.too_long != "cut" and self.packing == "concat":
            raise ValueError(
                f"`too_long: {self.too_long}` keeps conversations whole, which `packing: concat` cuts at the end of "
                "each block: set `packing` to best_fit or none"
            )
        for key, usual in USUAL.items():
            if self.format == "text" and getattr(self, key) != usual:
                raise ValueError(f"`{key}` is for conversations (`format: chat`); this stream's format is text")
        if self.format == "chatml" and self.template != "chatml":
            raise ValueError(
                f"`format: chatml` has its own template: for `template: {self.template}` set `format: chat`"
            )
        if self.template == "chatml":
            if self.control_tokens != "auto" or self.date:
                raise ValueError("`control_tokens` and `date` are for templates other than chatml")
            if self.format == "chat":
                self.format = "chatml"  # the same thing by its older name, which stands in manifests
        return self
