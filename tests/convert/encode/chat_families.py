"""Tiny tokenizers and chat templates of our own that behave as those of the model families do."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.probe import chats_of, probed
from chimera.convert.encode.proof import prove_sample
from chimera.convert.read.parsing import Dropped
from chimera.convert.settings import BuildSettings
from chimera.manifest import ChatTemplate
from tests.convert.small_tokenizer import EOS, PAD, changed

QWEN = """
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set c = m.content -%}
{%- if m.role == 'assistant' and '</think>' in c -%}
{%- set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set c = c.split('</think>')[-1].lstrip('\n') -%}
{%- if loop.index0 > ns.asked -%}{%- set c = '<think>\n' + thought + '\n</think>\n\n' + c -%}{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""".strip()

MISTRAL = (  # its system text is lost, its turns end with EOS
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

ZEPHYR = (  # every turn ends with EOS, and no BOS is written
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

GPT_OSS = (
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

PHI = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

DEEPSEEK = (  # its headers are no special tokens; the end is written for each answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

REASONER = DEEPSEEK.replace(
    "'<｜Assistant｜>' }}{% endif %}", "'<｜Assistant｜><think>\n' }}{% endif %}"
)  # R1's prompt

LLAMA = (
    "{{ bos_token }}{% if tools %}"
    "{{ '<|start_header_id|>tools<|end_header_id|>\n\n' + tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    """{{ '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}' }}"""
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

SMOL = (  # takes a switch out of the system text
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content | replace('/no_think', '') if m.role == 'system' else m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEMMA = (  # strict: no system text, turns in alternation
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def llama2_spec() -> str:
    """A tokenizer of Llama 2's kind: a space before each text, bytes for what it does not know."""
    pieces = [
        "▁",
        "H",
        "e",
        "l",
        "o",
        "a",
        "b",
        "c",
        "i",
        "s",
        "t",
        "h",
        "x",
        "n",
        "r",
        "ll",
        "Hell",
        "He",
        "Hello",
        "▁Hello",
        "▁a",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [["l", "l"], ["H", "e"], ["He", "ll"], ["Hell", "o"], ["▁", "Hello"], ["▁", "a"]]
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
        **{"vocab": {token: id_ for id_, token in enumerate(tokens)}, "merges": merges},
    }
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        *({"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        **{"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None},
        "added_tokens": [{"id": i, "content": tokens[i], "special": True, **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return json.dumps(spec)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer (each with `flags` set), and added ones that are `plain`."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    llama2: bool = False
    pre_tokenizer: str = ""  # in place of its normalizers: Metaspace by this scheme
    eos: str = EOS

    def write(self, folder: Path) -> Path:
        """The tokenizer's folder."""
        spec = json.loads(llama2_spec()) if self.llama2 else changed()
        if self.pre_tokenizer:
            scheme = {"prepend_scheme": self.pre_tokenizer, "split": False}
            spec["normalizer"] = None
            spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", **scheme}
        have = {token["content"] for token in spec["added_tokens"]}
        after = max(*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])) + 1
        for token in (*self.special, *self.plain, EOS, PAD):
            if token not in have:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                flags |= dict.fromkeys(self.flags if token in self.special else (), True)
                spec["added_tokens"].append(
                    {"id": after, "content": token, "special": token not in self.plain, **flags}
                )
                have.add(token)
                after += 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
        named = {"eos_token": EOS, "pad_token": PAD, **self.named}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template or None, **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
        return folder


FAMILIES = {
    "qwen": Family(QWEN, ("<|im_start|>", "<|im_end|>"), plain=("<think>", "</think>")),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), named={"bos_token": "<s>", "eos_token": "</s>"}),
    "zephyr": Family(ZEPHYR, ("<s>", "</s>"), named={"eos_token": "</s>"}, eos="</s>"),
    "gpt_oss": Family(GPT_OSS, ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"), eos="<|return|>"),
    "phi": Family(
        PHI,
        ("<|user|>", "<|assistant|>", "<|end|>"),
        flags=("rstrip",),
        named={"bos_token": "<s>"},
        llama2=True,
    ),
    "deepseek": Family(
        DEEPSEEK, ("<｜begin｜>", "<｜end｜>"), ("<｜User｜>", "<｜Assistant｜>"), named={"bos_token": "<｜begin｜>"}
    ),
    "reasoner": Family(
        REASONER, ("<｜begin｜>", "<｜end｜>"), ("<｜User｜>", "<｜Assistant｜>"), named={"bos_token": "<｜begin｜>"}
    ),
    "llama": Family(
        LLAMA,
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        named={"bos_token": "<|begin|>"},
    ),
    "smol": Family(SMOL, ("<|im_start|>", "<|im_end|>")),
    "gemma": Family(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), named={"bos_token": "<bos>"}),
    "plain": Family(PLAIN, ()),
}


class Chats:
    """The documents of one family's stream: what its builder makes of rows."""

    def __init__(self, family: Family, folder: Path, pad: str | None = PAD, **stream: Any) -> None:
        tokenizer = {"path": str(family.write(folder)), "eos_token": family.eos, "pad_token": pad}
        chat = {"format": "chat", "template": "tokenizer", "min_tokens": 1, "sources": [{"files": ["x"]}], **stream}
        self.settings = BuildSettings.model_validate({"output": "o", "tokenizer": tokenizer, "streams": {"chat": chat}})
        self.stream = self.settings.streams["chat"]
        encoder = Encoder.from_settings(self.settings.tokenizer)
        self.template = probed("chat", self.stream, self.settings, encoder)
        assert isinstance(self.template, ChatTemplate)
        self.encoder = encoder.with_control(self.template.control)
        chats = chats_of(self.settings, self.template, self.encoder)
        self.reader = DocumentReader(self.stream, self.encoder.special_ids, "", chats)

    def read(self, messages: Sequence[Any], **row: Any) -> Document | Dropped:
        """The document of a conversation: of (role, content) pairs or whole messages."""
        turns = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
        return self.reader.read({"messages": turns, **row})

    def stored(self, messages: Sequence[Any], **row: Any) -> tuple[list[int], list[bool]]:
        """The ids and the mask of a conversation that is one document."""
        document = self.read(messages, **row)
        assert isinstance(document, Document), document
        ((ids, mask),) = self.encoder.encode([document])
        assert mask is not None
        return ids.tolist(), mask.tolist()

    def learned(self, messages: Sequence[Any], **row: Any) -> str:
        """The tokens that are learned, as text."""
        ids, mask = self.stored(messages, **row)
        return self.encoder.decode(np.array(ids[1:])[mask[1:]].tolist())

    def why(self, messages: Sequence[Any], **row: Any) -> str:
        """Why a conversation is dropped."""
        dropped = self.read(messages, **row)
        assert isinstance(dropped, Dropped)
        return dropped.reason

    def prove(self, *chats: Sequence[Any]) -> str:
        """What the proof says of these conversations."""
        rows = [{"messages": [{"role": role, "content": text} for role, text in messages]} for messages in chats]
        documents: list[Any] = [self.reader.read(row) for row in rows]
        return prove_sample("chat", rows, documents, self.reader, self.encoder, self.settings.tokenizer)

    def id(self, token: str) -> int:
        return self.encoder.special_ids[token]

    def ids(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.encoder.encode([Document((text.encode(),))])[0][0][:-1].tolist()
