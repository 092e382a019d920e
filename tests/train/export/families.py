"""Base models of ten families, tiny, each with its own architecture and the conventions of its own tokenizer.

Tokenizers are trained on the spot. What is a family's: the kind and class of its tokenizer, what stands before a text,
the tokens that end texts and turns, and its chat template (shortened) with where it stands.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from chimera.tokenizer_file import with_tokens

_WORDS = (
    "il la un una di che non è perché città più università casa acqua the of and water light river number 2024 3,14"
)
_WORDS += " naïve 東京 😀 — l'anno dell'opera they'll don't x=1; (così)"
TEXTS = [
    ("", "  ", "\n", "")[i % 4]
    + " ".join(_WORDS.split()[(7 * i + 3 * j) % 29] for j in range(20 + i % 30))
    + ("\n\n", " ", ".", "  fine\t!\n")[i % 4]
    for i in range(40)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"{text[:40]}?"}, {"role": "assistant", "content": text.strip()}]}
    for text in TEXTS
]
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_TEXT_OF_5 = (  # how Qwen's tokenizer cuts words; transformers 5 has it in its class
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _byte_level(pattern: str | None = None) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return str(made.to_str())


@cache
def _sentencepiece(first: tuple[str, ...]) -> str:
    """BPE of characters with a fallback to bytes; its ids begin with `first`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(pieces)
    first = (*first, *(f"<0x{byte:02X}>" for byte in range(256)))
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=list(first), show_progress=False)
    )
    spec = json.loads(made.to_str())
    return json.dumps({**spec, "added_tokens": []})


@dataclass(frozen=True)
class Family:
    model: dict[str, Any]  # of its configuration, beside the usual sizes
    kind: str  # of its tokenizer.json
    tokens: tuple[str, ...]  # special ones
    config: dict[str, Any]  # tokenizer_config.json
    eos: str  # ends documents
    ends: tuple[str, ...]  # where its generation config has `generate` stop
    pad: str | None = None
    bos: str | None = None  # which the export puts before a text
    by_class: bool = False  # its own tokenizer does by `add_bos_token` if at all: no post-processor has it
    put: str = "auto"  # the shards' `tokenizer.bos`
    template: str | None = None
    beside: bool = False  # the template stands in chat_template.jinja alone
    asked: str = ""  # what a model is asked by a user who says `Ciao?`
    system: str | None = None  # likewise with the system text `Sii breve.`; None: refused
    chats: bool = False  # trained on chats too
    add: tuple[str, ...] = ()  # special tokens that the shards add
    changes: tuple[str, ...] = ()  # what the card says of the export, by how it begins
    rstrip: bool = False  # special tokens but EOS take the white space after them
    plain: tuple[str, ...] = field(default=())  # added tokens that are not special

    def tokenizer(self) -> dict[str, Any]:
        if self.kind in ("llama", "mistral", "gemma"):
            spec = json.loads(with_tokens(_sentencepiece(self.tokens).encode(), self.tokens))
            spec |= _SENTENCEPIECE[self.kind]
            if self.kind == "gemma":
                spec["decoder"]["decoders"].pop()  # it has no space before a text to take away
        else:
            spec = json.loads(_byte_level(_TEXT_OF_5 if self.kind == "qwen" else None))
            spec = json.loads(with_tokens(json.dumps(spec).encode(), (*self.tokens, *self.plain)))
        for token in spec["added_tokens"]:
            token["special"] = token["content"] not in self.plain
            token["rstrip"] = self.rstrip and token["content"] not in ("<unk>", "<s>", self.eos)
        if self.bos and not self.by_class:
            text = [{"SpecialToken": {"id": self.bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            ids = [token["id"] for token in spec["added_tokens"] if token["content"] == self.bos]
            puts = {
                "type": "TemplateProcessing",
                "single": text,
                "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
            }
            puts["special_tokens"] = {self.bos: {"id": self.bos, "ids": ids, "tokens": [self.bos]}}
            spec["post_processor"] = puts
        return dict(spec)

    def write(self, folder: Path) -> Path:
        """The model folder, as its authors would have uploaded it: weights in bfloat16."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = self.tokenizer()
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        size = max(*tokenizer["model"]["vocab"].values(), *ids.values()) + 1
        marks = {f"{key}_token_id": ids.get(self.config.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
        torch.manual_seed(1)
        config = AutoConfig.for_model(**{**_SIZES, **marks, **self.model}, vocab_size=size)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(folder)
        generation = {**marks, "eos_token_id": [ids[end] for end in self.ends], "do_sample": True, "temperature": 0.6}
        known = {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokenizer["added_tokens"]
        }
        config = {"model_max_length": 128, "clean_up_tokenization_spaces": False, "added_tokens_decoder": known}
        config |= self.config
        if self.template and not self.beside:
            config["chat_template"] = self.template
        if self.template and self.beside:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        special = {key: value for key, value in self.config.items() if key in ("bos_token", "eos_token", "pad_token")}
        for name, value in {
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
            "generation_config.json": {key: value for key, value in generation.items() if value is not None},
        }.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")  # not as we write
        return folder


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 128}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _SPACES]},
        "pre_tokenizer": None,
    },
    "mistral": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
    "gemma": {
        "normalizer": _SPACES,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    },
}
_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_INST = (
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nReasoning Mode: /think<|im_end|>\n' }}{% endif %}"
)


def _asked(user: str, system: str | None = None) -> str:
    """Both in ChatML."""
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


FAMILIES = {
    "llama2": Family(
        model={"model_type": "llama"},
        kind="llama",
        tokens=("<unk>", "<s>", "</s>"),
        config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        | {"add_bos_token": True, "add_eos_token": False, "legacy": False},
        eos="</s>",
        ends=("</s>",),
        bos="<s>",
        # which transformers 5 builds without the file's normalizer: a text's first spaces would have other ids
        changes=("tokenizer_config.json: its class was LlamaTokenizer",),
        # the system text goes into the first user's; each turn of the user begins with BOS
        template="{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + "
        "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + "
        "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        asked="<s>[INST] Ciao? [/INST]",
        system="<s>[INST] <<SYS>>\nSii breve.\n<</SYS>>\n\nCiao? [/INST]",
    ),
    "llama3": Family(
        model={"model_type": "llama", "tie_word_embeddings": True},
        kind="llama3",
        tokens=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
        | {"eos_token": "<|eot_id|>", "model_input_names": ["input_ids", "attention_mask"]},
        eos="<|end_of_text|>",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        asked="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nCiao?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSii breve.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nCiao?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": Family(
        model={"model_type": "mistral", "sliding_window": 32},
        kind="mistral",
        tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        | {"add_bos_token": True, "add_eos_token": False, "legacy": False},
        eos="</s>",
        ends=("</s>",),
        bos="<s>",
        put="never",
        template="{{ bos_token }}" + _ALTERNATE + _INST,
        asked="<s>[INST] Ciao? [/INST]",
    ),
    "gemma3": Family(
        model={"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8},
        kind="gemma",
        tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        config={"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        | {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False},
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        pad="<pad>",
        bos="<bos>",
        beside=True,
        template="{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
        "(s if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        asked="<bos><start_of_turn>user\nCiao?<end_of_turn>\n<start_of_turn>model\n",
        system="<bos><start_of_turn>user\nSii breve.\n\nCiao?<end_of_turn>\n<start_of_turn>model\n",
        changes=("tokenizer_config.json: it also holds the chat template",),
    ),
    "phi3": Family(
        model={"model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": 128},
        kind="llama",
        tokens=("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
        | {"pad_token": "<|endoftext|>", "unk_token": "<unk>", "add_bos_token": False, "add_eos_token": False}
        | {"legacy": False},
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        pad="<unk>",
        rstrip=True,
        bos="<s>",  # its own tokenizer puts none
        by_class=True,
        put="always",
        changes=(
            "tokenizer.json: it puts before a text what each had in training",
            "tokenizer_config.json: `add_bos_token`",
        ),
        template="{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        asked="<|user|>\nCiao?<|end|>\n<|assistant|>\n",
        system="<|system|>\nSii breve.<|end|>\n<|user|>\nCiao?<|end|>\n<|assistant|>\n",
    ),
    "qwen3": Family(
        model={"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
        kind="qwen",
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"),
        config={"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|endoftext|>"}
        | {"pad_token": "<|endoftext|>", "add_bos_token": False, "add_prefix_space": False, "unk_token": None},
        eos="<|endoftext|>",
        ends=("<|endoftext|>",),
        pad="<|fim_pad|>",
        template=_CHATML,
        asked=_asked("Ciao?"),
        system=_asked("Ciao?", "Sii breve."),
        chats=True,
        changes=("generation_config.json: `<|im_end|>` end",),
    ),
    "smollm3": Family(
        model={"model_type": "smollm3", "no_rope_layer_interval": 2, "tie_word_embeddings": True},
        kind="llama3",
        tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
        config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}
        | {"pad_token": "<|im_end|>", "model_input_names": ["input_ids", "attention_mask"]},
        eos="<|end_of_text|>",
        ends=("<|im_end|>",),
        pad="<|pad|>",
        beside=True,
        template=_DEFAULT_SYSTEM + _CHATML,
        asked=_asked("Ciao?", "Reasoning Mode: /think"),
        system=_asked("Ciao?", "Sii breve."),
        changes=(
            "tokenizer_config.json: it also holds the chat template",
            "generation_config.json: `<|end_of_text|>` end",
        ),
    ),
    "olmo2": Family(
        model={"model_type": "olmo2"},
        kind="gpt2",
        tokens=("<|endoftext|>", "<|pad|>"),
        config={"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        | {"pad_token": "<|pad|>", "add_prefix_space": False, "unk_token": "<|endoftext|>"},
        eos="<|endoftext|>",
        ends=("<|endoftext|>",),
        pad="<|pad|>",
        # BOS is the template's alone
        template="{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
        "(eos_token if m['role'] == 'assistant' else '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        asked="<|endoftext|><|user|>\nCiao?\n<|assistant|>\n",
        system="<|endoftext|><|system|>\nSii breve.\n<|user|>\nCiao?\n<|assistant|>\n",
    ),
    "deepseek_v3": Family(
        model={"model_type": "deepseek_v3", "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "n_group": 1}
        | {"num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
        kind="llama3",
        tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>"),
        config={"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<｜begin▁of▁sentence｜>"}
        | {"eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜end▁of▁sentence｜>", "add_bos_token": True}
        | {"add_eos_token": False, "legacy": True, "unk_token": None},
        eos="<｜end▁of▁sentence｜>",
        ends=("<｜end▁of▁sentence｜>",),
        pad="<｜▁pad▁｜>",
        bos="<｜begin▁of▁sentence｜>",
        by_class=True,
        put="always",
        changes=("tokenizer.json: it puts before a text what each had in training",),
        template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        asked="<｜begin▁of▁sentence｜><｜User｜>Ciao?<｜Assistant｜>",
        system="<｜begin▁of▁sentence｜>Sii breve.<｜User｜>Ciao?<｜Assistant｜>",
    ),
    "gpt2": Family(
        model={"model_type": "gpt2"},
        kind="gpt2",
        tokens=("<|endoftext|>",),
        config={"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        | {"unk_token": "<|endoftext|>", "add_prefix_space": False},
        eos="<|endoftext|>",
        ends=("<|endoftext|>",),
        add=("<|im_start|>", "<|im_end|>"),
        asked="<|im_start|>user\nCiao?<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\nSii breve.<|im_end|>\n<|im_start|>user\nCiao?<|im_end|>\n<|im_start|>assistant\n",
        chats=True,
        changes=(
            "the vocabulary: 2 tokens more (`<|im_end|>`, `<|im_start|>`)",
            "the chat template: ChatML, as was trained",
            "generation_config.json: `<|im_end|>` end",
        ),
    ),
}
