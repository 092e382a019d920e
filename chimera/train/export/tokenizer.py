"""What an export is spoken to with: tokenizer, template, generation config; the base's, or from what was trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from chimera.chatml import CHAT_TEMPLATE
from chimera.text import code, counted
from chimera.tokenizer_file import before_text, load, put_before_text
from chimera.train.export.trained import CHATML, Trained, trained_ends

CONFIG, JINJA, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
MORE = "additional_chat_templates/"
_SAID = {"role": "assistant", "content": "Salve."}
_CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Ciao?"}],
    [{"role": "user", "content": "Ciao?"}, _SAID, {"role": "user", "content": "E poi?"}],
    [{"role": "system", "content": "Sii breve."}, {"role": "user", "content": "Ciao?"}],
]


@dataclass
class Spoken:
    """Files by name, as they are written; `changes` names what of the base differs in them."""

    files: dict[str, bytes]
    changes: list[str] = field(default_factory=list)

    def json(self, name: str) -> dict[str, Any]:
        found = json.loads(self.files.get(name, b"{}"))
        return found if isinstance(found, dict) else {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.files[name] = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def spoken(
    about: Mapping[str, Any], trained: Trained, written: bytes | None, context: int | None, longest: int
) -> Spoken:
    """The files of the export of a checkpoint.

    Args:
        about: what the checkpoint keeps of its run.
        trained: the template of the chats that the weights have seen.
        written: the generation config that `transformers` writes for the model, if any.
        context: tokens of the longest sequence the model takes; None where it has no bound.
        longest: tokens of the longest sequences it was trained on.
    """
    ends = trained_ends(about, trained)
    kept = (about.get("base") or {}).get("files", {})
    if CONFIG not in kept and "tokenizer.json" not in kept:
        return _from_nothing(about, trained, ends, context)
    found = Spoken({name: data for name, data in kept.items() if name != "config.json"})
    _leave_code_out(found)
    _grow(found, about)
    _settle_bos(found, about.get("bos", []))
    _settle_template(found, about, trained)
    config = found.json(CONFIG)
    if (most := config.get("model_max_length")) is not None and most < longest:
        found.write_json(CONFIG, {**config, "model_max_length": longest})
        found.changes.append(f"tokenizer_config.json: texts of {longest} tokens, as was trained; it named {most}")
    _settle_ends(found, about, ends, written)
    return found


def _from_nothing(about: Mapping[str, Any], trained: Trained, ends: list[str], context: int | None) -> Spoken:
    """All of it from the shards' tokenizer: nothing stands before a text that did not in training."""
    found = Spoken({})
    spec = json.loads(about["tokenizer"])
    spec["post_processor"] = _adds_nothing(spec.get("post_processor"))
    spec["truncation"] = spec["padding"] = None  # of a file's own, which cut no text in training
    if spec["model"].get("dropout"):
        spec["model"]["dropout"] = None
    ids, bos = _ids(about), about.get("bos", [])
    if bos:
        _put_bos(spec, bos)
    found.files["tokenizer.json"] = json.dumps(spec, indent=2, ensure_ascii=False).encode() + b"\n"
    names = {id_: token for token, id_ in ids.items()}
    marks = {
        "eos_token": about["eos_token"],
        "pad_token": about["pad_token"],
        "bos_token": names[bos[0]] if bos else None,
    }
    marks = {key: token for key, token in marks.items() if token is not None} | trained.named
    config = of_no_class({**marks, "clean_up_tokenization_spaces": False})
    if context is not None:
        config["model_max_length"] = context
    if trained.template:
        _write_template(found, config, trained.template.texts)
    found.write_json(CONFIG, config)
    found.write_json("special_tokens_map.json", marks)
    generation = {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": sorted({ids[end] for end in ends if end in ids}),
        "pad_token_id": ids[about["pad_token"]] if about["pad_token"] else None,
        "max_new_tokens": 256,
    }
    found.files[GENERATION] = json.dumps(generation, indent=2).encode() + b"\n"
    return found


def of_no_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json by which a reader takes tokenizer.json as it is."""
    inputs = ["input_ids", "attention_mask"]  # else also token_type_ids, which `generate` refuses in transformers 4
    return {"model_input_names": inputs, **config, "tokenizer_class": "PreTrainedTokenizerFast"}


def _put_bos(spec: dict[str, Any], bos: Sequence[int]) -> None:
    """Have a tokenizer.json put `bos` before a text."""
    loaded = load(json.dumps(spec))
    put_before_text(loaded, bos)
    spec["post_processor"] = json.loads(loaded.to_str())["post_processor"]


def _adds_nothing(processor: Any) -> Any:
    """A post-processor without what puts special tokens around a text."""
    if processor is None or processor["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor["type"] == "Sequence":
        kept = [each for each in map(_adds_nothing, processor["processors"]) if each]
        return {**processor, "processors": kept} if kept else None
    return processor


def _grow(found: Spoken, about: Mapping[str, Any]) -> None:
    """Add to the base's tokenizer the tokens that the shards' has beside its own."""
    if "tokenizer.json" not in found.files:
        found.files["tokenizer.json"] = about["tokenizer"].encode()
        found.changes.append("tokenizer.json: the base has none, it is the shards'")
        return
    base = load(found.files["tokenizer.json"]).get_vocab(with_added_tokens=True)
    if new := sorted(_ids(about).keys() - base.keys()):
        spec, ours = found.json("tokenizer.json"), json.loads(about["tokenizer"])
        spec |= {key: ours[key] for key in ("model", "added_tokens")}
        found.files["tokenizer.json"] = json.dumps(spec, indent=2, ensure_ascii=False).encode() + b"\n"
        config = found.json(CONFIG)
        if "added_tokens_decoder" in config:  # beside it, transformers 5 passes over the added tokens of tokenizer.json
            known = dict(config["added_tokens_decoder"])
            for token in ours["added_tokens"]:
                if token["content"] in new:
                    known[str(token["id"])] = {key: value for key, value in token.items() if key != "id"}
            found.write_json(CONFIG, {**config, "added_tokens_decoder": known})
        some = ", ".join(map(code, new[:3])) + (", …" if len(new) > 3 else "")
        found.changes.append(f"the vocabulary: {counted(len(new), 'token')} more ({some})")


def _leave_code_out(found: Spoken) -> None:
    """Name no class of a base's own code, which an export does not hold: its tokenizer.json says all of it."""
    config = found.json(CONFIG)
    if "auto_map" in config:
        config = {key: value for key, value in config.items() if key != "auto_map"}
        found.write_json(CONFIG, of_no_class(config))
        found.changes.append("tokenizer_config.json: no code of the base's own, but the class of tokenizer.json")


def _settle_bos(found: Spoken, bos: Sequence[int]) -> None:
    """What each text began with in training stands before a text, where the base's tokenizer puts something else."""
    if not bos:
        return
    spec, config = found.json("tokenizer.json"), found.json(CONFIG)
    if before_text(load(found.files["tokenizer.json"])) != bos:
        _put_bos(spec, bos)
        found.files["tokenizer.json"] = json.dumps(spec, indent=2, ensure_ascii=False).encode() + b"\n"
        found.changes.append("tokenizer.json: it puts before a text what each had in training")
    if config.get("add_bos_token") is False:  # by which some classes of transformers 4 go
        found.write_json(CONFIG, {**config, "add_bos_token": True})
        found.changes.append("tokenizer_config.json: `add_bos_token`, as was trained")


def _write_template(found: Spoken, config: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Put a template, of one name or several, where new readers look and, in `config`, where older ones do."""
    several = [{"name": name, "template": text} for name, text in texts.items()]
    config["chat_template"] = texts["default"] if len(texts) == 1 else several
    found.files = {name: data for name, data in found.files.items() if not name.startswith(MORE)}
    for name, text in texts.items():
        found.files[JINJA if name == "default" else f"{MORE}{name}.jinja"] = text.encode()


def _templates(found: Spoken) -> dict[str, str]:
    """The templates of a base by name, as its readers find them."""
    inline = found.json(CONFIG).get("chat_template")
    texts = {each["name"]: each["template"] for each in inline} if isinstance(inline, list) else {}
    texts |= {"default": inline} if isinstance(inline, str) else {}
    texts |= {
        name.removeprefix(MORE).removesuffix(".jinja"): data.decode()
        for name, data in found.files.items()
        if name.startswith(MORE)
    }
    return texts | ({"default": found.files[JINJA].decode()} if JINJA in found.files else {})


def _settle_template(found: Spoken, about: Mapping[str, Any], trained: Trained) -> None:
    """The trained template, unless the base's says the same, and in both of the places where readers look."""
    config, own = found.json(CONFIG), _templates(found)
    texts = trained.template.texts if trained.template else {}
    older = config.get("chat_template")
    said = all(_names(config, trained.named) and own.get(name) == text for name, text in texts.items())
    if not said and not (trained.template == CHATML and _asks_the_same(about, config, own.get("default"))):
        whose = "ChatML" if trained.template == CHATML else f"the one of {' and '.join(trained.streams)}"
        found.changes.append(f"the chat template: {whose}, as was trained")
        for key, token in trained.named.items():
            if _content(config.get(key)) != token:
                found.changes.append(
                    f"tokenizer_config.json: `{key}` is {code(token)}, as the trained template writes it"
                )
                config[key] = token
        _write_template(found, config, texts)
    elif "default" in own:
        found.files.setdefault(JINJA, own["default"].encode())
        if config.get("chat_template") is None:
            found.changes.append("tokenizer_config.json: it also holds the chat template, where older readers look")
            config["chat_template"] = own["default"]
        elif isinstance(older, str) and older != own["default"] and texts:
            found.changes.append("tokenizer_config.json: the chat template of chat_template.jinja, as was trained")
            config["chat_template"] = own["default"]
    if config.get("tokenizer_class") == "TokenizersBackend":
        found.changes.append("tokenizer_config.json: its class by the name that transformers 4 knows too")
        config = of_no_class(config)
    if config != found.json(CONFIG):
        found.write_json(CONFIG, config)


def _names(config: Mapping[str, Any], tokens: Mapping[str, str]) -> bool:
    """Whether a base names these special tokens as the trained template writes them."""
    return all(_content(config.get(key)) == token for key, token in tokens.items())


def _asks_the_same(about: Mapping[str, Any], config: Mapping[str, Any], own: str | None) -> bool:
    """Whether a base's template makes of what a model is asked the text that ChatML does."""
    if own is None:
        return False
    marks = {key: token for key in ("bos_token", "eos_token") if (token := _content(config.get(key)))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load(about["tokenizer"]), **marks)

    def says(template: str) -> list[Any]:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
        return [tokenizer.apply_chat_template(chat, **options) for chat in _CHATS]

    try:
        return says(own) == says(CHAT_TEMPLATE)
    except Exception:  # a template may refuse what another takes: a system text, say
        return False


def _content(token: Any) -> str | None:
    """A special token as a tokenizer's configuration has it, by its text or as a mapping."""
    return token.get("content") if isinstance(token, Mapping) else token


def _settle_ends(found: Spoken, about: Mapping[str, Any], ends: list[str], written: bytes | None) -> None:
    """The base's generation config; where the run trained other ends than it knows, `generate` stops at them too."""
    if GENERATION not in found.files:
        found.files[GENERATION] = written or b"{}\n"
    config, ids = found.json(GENERATION), _ids(about)
    own = config.get("eos_token_id")
    known = [] if own is None else own if isinstance(own, list) else [own]
    if new := [end for end in ends if ids[end] not in known]:
        found.write_json(GENERATION, {**config, "eos_token_id": [*known, *(ids[end] for end in new)]})
        found.changes.append(
            f"generation_config.json: {' and '.join(map(code, new))} {'end' if len(new) > 1 else 'ends'} a text too"
        )


def _ids(about: Mapping[str, Any]) -> dict[str, int]:
    return dict(load(about["tokenizer"]).get_vocab(with_added_tokens=True))
