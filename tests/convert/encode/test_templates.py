"""Chat templates: what is stored is what the tokenizer's own template gives, and contents stay text in it."""

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.cli import UserError
from chimera.convert.encode.document import Document
from chimera.convert.encode.template import loaded_tokenizer
from tests.convert.encode.chat_families import FAMILIES, Chats
from tests.convert.small_tokenizer import PAD

USER, SAID = ("user", "Il gatto?"), ("assistant", "Dorme.")
TWICE = [USER, SAID, ("user", "E ora?"), ("assistant", "Mangia il pesce.")]


@pytest.fixture
def chats(tmp_path: Path) -> Any:
    return lambda name, **stream: Chats(FAMILIES[name], tmp_path / name, **stream)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"plain", "reasoner"}))
def test_ids_are_those_of_apply_chat_template_with_the_bos_it_writes_once(name: str, chats: Any) -> None:
    made = chats(name)
    assert "ids equal apply_chat_template's in 3 conversations" in made.prove(
        [USER, SAID], TWICE, [USER, ("assistant", "x\n")]
    )
    bos = FAMILIES[name].named.get("bos_token")
    ids, _ = made.stored(TWICE)
    assert bos is None or [n for n, id_ in enumerate(ids) if id_ == made.id(bos)] == [0]
    assert ids.count(made.encoder.eos_id) == (4 if made.template.eos_inside else 1)
    assert ids[-1] == made.encoder.eos_id


@pytest.mark.parametrize("scheme", ["", "first", "always", "never"])
@pytest.mark.parametrize("flags", [(), ("lstrip",), ("rstrip",), ("lstrip", "rstrip")], ids="+".join)
@pytest.mark.parametrize("name", ["smol", "phi"])
def test_ids_at_joints_are_those_of_apply_chat_template(
    name: str, flags: tuple[str, ...], scheme: str, tmp_path: Path
) -> None:
    family = replace(FAMILIES[name], flags=flags, pre_tokenizer=scheme, llama2=name == "phi" or bool(scheme))
    made = Chats(family, tmp_path)
    spaced = [("user", " Hello  "), ("assistant", "Hello \n"), ("user", "\u3000a\x1c"), ("assistant", "a")]
    assert "in 2 conversations" in made.prove(spaced, TWICE)


def test_normalized_specials_are_stored_as_they_are_served_or_refused(tmp_path: Path) -> None:
    made = Chats(replace(FAMILIES["smol"], flags=("normalized", "rstrip")), tmp_path / "bytes")
    assert "in 1 conversation" in made.prove(TWICE)
    prefixed = Chats(replace(FAMILIES["phi"], flags=("normalized",)), tmp_path / "prefix")
    with pytest.raises(UserError, match=r"the shards would hold .* and apply_chat_template gives"):
        prefixed.prove(TWICE)


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("qwen", "Dorme.<|im_end|>Mangia il pesce.<|im_end|>"),
        ("mistral", " Dorme.</s> Mangia il pesce.</s>"),
        ("zephyr", "Dorme.</s>Mangia il pesce.</s>"),
        ("deepseek", "Dorme.<｜end｜>Mangia il pesce.<｜end｜>"),
        ("llama", "Dorme.<|eot_id|>Mangia il pesce.<|eot_id|>"),
        ("gemma", "Dorme.<end_of_turn>Mangia il pesce.<end_of_turn>"),
        ("gpt_oss", "<|channel|>final<|message|>Mangia il pesce.<|return|>"),
    ],
)
def test_an_answer_is_learned_to_the_token_that_ends_its_turn(name: str, learned: str, chats: Any) -> None:
    assert chats(name).learned(TWICE) == learned


# The ten cases


def test_case_1_a_control_token_in_an_answer_is_text_and_its_turn_ends_once(chats: Any) -> None:
    made = chats("qwen")
    ids, mask = made.stored([USER, ("assistant", "say <|im_end|> now")])
    assert ids.count(made.id("<|im_end|>")) == 2
    assert made.learned([USER, ("assistant", "say <|im_end|> now")]) == "say <|im_end|> now<|im_end|>"
    end = len(ids) - 3  # before the newline of the template, and EOS
    assert ids[end] == made.id("<|im_end|>")
    assert mask[end : end + 2] == [True, False]


def test_case_2_halves_of_a_control_token_stay_text(chats: Any) -> None:
    made = chats("qwen")
    ids, _ = made.stored([("user", "x<|im_end|"), ("assistant", "|im_start|> hi")])
    assert [ids.count(made.id(token)) for token in ("<|im_start|>", "<|im_end|>")] == [2, 2]
    assert made.learned([("user", "x<|im_end|"), ("assistant", "|im_start|> hi")]) == "|im_start|> hi<|im_end|>"


def test_case_3_an_answer_whose_reasoning_is_dropped_later_is_seen_and_not_learned(chats: Any) -> None:
    made = chats("qwen")
    turns = [USER, ("assistant", "<think>a</think>Dorme."), USER, ("assistant", "<think>b</think>Mangia.")]
    assert made.learned(turns) == "<think>\nb\n</think>\n\nMangia.<|im_end|>"
    assert made.read(turns).counted == (("turns", "rewritten"),)
    ids, _ = made.stored(turns)
    assert "<think>\na" not in made.encoder.decode(ids)


def test_case_4_a_row_of_which_the_template_loses_a_text_is_rejected(chats: Any) -> None:
    made = chats("mistral")
    assert made.why([("system", "Sii breve."), *TWICE]) == "lost:system"
    assert isinstance(made.read(TWICE), Document)


def test_case_5_reasoning_is_learned_with_the_last_answer_and_its_header_is_not(chats: Any) -> None:
    made = chats("gpt_oss", date="2026-01-31")
    first, last = (
        {"role": "assistant", "content": "Dorme.", "thinking": "a"},
        {"role": "assistant", "content": "No.", "thinking": "b"},
    )
    learned = "<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>"
    assert made.learned([USER, first, USER, last]) == learned
    assert made.read([USER, first, USER, last]).counted == (("turns", "rewritten"),)
    assert "Today: 2026-01-31" in made.encoder.decode(made.stored([USER, SAID])[0])


def test_case_6_white_space_that_a_token_swallows_never_goes_past_where_generation_begins(chats: Any) -> None:
    made = chats("phi")
    ids, mask = made.stored([("user", "a"), ("assistant", "\n\nHello")])
    newline = made.ids("\n\n")[-2:]  # bytes, behind the space before a text
    said = [id_ for id_, learned in zip(ids, mask, strict=True) if learned]
    assert said[-1] == made.id("<|end|>")
    assert [id_ for id_ in said if id_ == newline[0]] == newline
    assert ids[ids.index(made.id("<|assistant|>")) + 1] in said
    assert (ids[-1], mask[-1]) == (made.encoder.eos_id, False)


def test_case_7_added_tokens_that_head_turns_are_control_tokens_though_not_special(chats: Any) -> None:
    made = chats("deepseek")
    assert made.template.control == ["<｜Assistant｜>", "<｜User｜>"]
    ids, _ = made.stored([("user", "a<｜User｜>b"), SAID])
    assert ids.count(made.id("<｜User｜>")) == 1
    assert "a<｜User｜>b" in made.encoder.decode(ids)


def test_case_8_a_prompt_that_ends_with_newlines_is_encoded_apart_from_its_answer(chats: Any) -> None:
    made = chats("llama")
    ids, mask = made.stored([USER, ("assistant", "Hello")])
    begin = mask.index(True)
    assert ids[begin - len(made.ids("\n\n")) : begin] == made.ids("\n\n")
    assert ids[begin:-1] == [*made.ids("Hello"), made.id("<|eot_id|>")]
    assert made.ids("\n\nHello") != made.ids("\n\n") + made.ids("Hello")


def test_case_9_a_tool_s_result_is_text_and_the_call_is_learned(chats: Any) -> None:
    made = chats("llama")
    call = {"function": {"name": "cerca", "arguments": '{"q": "x <|eot_id|>"}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, ("tool", 'line\n"q" <|eot_id|>'), SAID]
    said = '{"name": "cerca", "parameters": {"q": "x <|eot_id|>"}}<|eot_id|>Dorme.<|eot_id|>'
    assert made.learned(turns) == said
    ids, _ = made.stored(turns)
    assert ids.count(made.id("<|eot_id|>")) == 4


def test_case_10_a_switch_that_a_template_takes_out_is_no_loss(chats: Any) -> None:
    made = chats("smol")
    ids, _ = made.stored([("system", "Be /no_think now"), USER, SAID])
    assert "Be  now" in made.encoder.decode(ids)


# Rules


def test_an_answer_that_does_not_begin_with_its_prompt_is_counted_as_such(chats: Any) -> None:
    made = chats("reasoner")
    assert made.why(TWICE) == "prompt"
    learned = [USER, SAID, USER, ("assistant", "<think>\nb</think>Mangia.")]
    assert made.learned(learned) == "b</think>Mangia.<｜end｜>"
    assert made.read(learned).counted == (("turns", "prompt"),)


def test_what_stands_in_no_generation_block_is_seen_and_not_learned(tmp_path: Path) -> None:
    """The blocks take in a header, and leave out what ends the turn: of an answer in one the same is learned."""
    said = "{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{{ '<|im_end|>\n' }}"
    block = "{% generation %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    last = f"{{% if m.role == 'assistant' and loop.last %}}{block}{{% else %}}{said}{{% endif %}}"
    template = "{% for m in messages %}" + last + "{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    made = Chats(replace(FAMILIES["smol"], template=template), tmp_path)
    assert made.learned(TWICE) == "Mangia il pesce.<|im_end|>"
    assert made.read(TWICE).counted == (("turns", "generation"),)
    assert made.why([*TWICE, ("user", "Sì?")]) == "generation"
    assert "in 2 conversations" in made.prove(TWICE, [USER, SAID])


def test_each_answer_is_a_document_of_its_own_where_turns_says_so(chats: Any) -> None:
    made = chats("qwen", turns="each")
    found = made.read([USER, ("assistant", "<think>a</think>Dorme."), USER, ("assistant", "<think>b</think>Mangia.")])
    documents = (found, *found.more)
    decoded = [made.encoder.decode(ids[mask].tolist()) for ids, mask in made.encoder.encode(documents)]
    assert decoded == [f"<think>\n{a}\n</think>\n\n{b}<|im_end|>" for a, b in (("a", "Dorme."), ("b", "Mangia."))]


def test_what_a_template_refuses_rejects_the_row(chats: Any) -> None:
    made = chats("gemma")
    assert made.why([("system", "Sii breve."), USER, SAID]) == "template_error"
    assert "must alternate" in made.reader.template_error
    assert made.why([USER, USER, SAID]) == "template_error"


def test_a_noncharacter_that_marks_texts_is_refused_in_them(chats: Any) -> None:
    assert chats("smol").why([("user", "a\ufdd0b"), SAID]) == "noncharacter"


@pytest.mark.parametrize(
    ("name", "field", "row"),
    [
        ("qwen", "tools", {"tools": [{"function": {"name": "cerca"}}]}),
        ("qwen", "tool_calls", {"tool_calls": [{"function": {"name": "cerca", "arguments": {}}}]}),
        ("qwen", "reasoning_content", {"reasoning_content": "penso"}),
        ("llama", "name", {"name": "Anna"}),
    ],
)
def test_a_field_that_the_template_has_no_place_for_rejects_the_row(
    name: str, field: str, row: Any, chats: Any
) -> None:
    message = {"role": "assistant", "content": "Dorme.", **({} if "tools" in row else row)}
    more = {"tools": row["tools"]} if "tools" in row else {}
    assert chats(name).why([USER, message], **more) == f"unused_field:{field}"


def test_tools_are_written_where_the_template_has_a_place_and_their_keys_are_text(chats: Any) -> None:
    made = chats("llama")
    tools = [{"type": "function", "function": {"name": "cerca", "parameters": {"<|eot_id|>": {"type": "string"}}}}]
    ids, _ = made.stored([USER, SAID], tools=tools)
    assert '"<|eot_id|>": {"type": "string"}' in made.encoder.decode(ids)
    assert ids.count(made.id("<|eot_id|>")) == 3


def test_a_content_lost_beside_a_call_rejects_the_row(chats: Any) -> None:
    call = {"role": "assistant", "content": "Cerco.", "tool_calls": [{"function": {"name": "cerca", "arguments": {}}}]}
    assert chats("llama").why([USER, call]) == "lost:assistant"


def test_control_tokens_named_in_the_settings_are_those_beside_the_special_ones(chats: Any) -> None:
    made = chats("qwen", control_tokens=["<think>"])
    assert made.template.control == ["<think>"]
    assert chats("deepseek", control_tokens=[]).template.control == []
    with pytest.raises(UserError, match=r"streams\.chat\.control_tokens: '<x>' is no added token"):
        chats("qwen", control_tokens=["<x>"])


def test_a_template_that_ends_turns_with_eos_has_its_starts_stored(tmp_path: Path) -> None:
    made = Chats(replace(FAMILIES["mistral"], eos="</s>"), tmp_path / "eos")
    assert "ids equal apply_chat_template's in 2 conversations" in made.prove([USER, SAID], TWICE)
    ids, mask = made.stored(TWICE)
    ends = [n for n, id_ in enumerate(ids) if id_ == made.encoder.eos_id]
    assert [mask[n] for n in ends] == [True, True]
    assert (mask[0], mask[ends[0] + 1], ends[-1]) == (True, False, len(ids) - 1)
    lenient = FAMILIES["mistral"].template.replace("' ' + m.content | trim", "m.content")
    made = Chats(replace(FAMILIES["mistral"], eos="</s>", template=lenient), tmp_path / "lenient")
    assert made.why([USER, SAID, SAID]) == "eos_inside"  # the second would be learned behind the first one's end


def test_a_template_without_an_end_or_with_padding_inside_is_refused(tmp_path: Path, chats: Any) -> None:
    with pytest.raises(UserError, match=r"ends an answer with '\\n', in which there is no special token"):
        chats("plain")
    padded = FAMILIES["smol"].template.replace("<|im_end|>", PAD)
    with pytest.raises(UserError, match=r"writes '<\|padding\|>' inside of conversations, and as tokenizer.pad_token"):
        Chats(replace(FAMILIES["smol"], template=padded), tmp_path / "pad")
    first = replace(FAMILIES["mistral"], named={"bos_token": "</s>"})
    with pytest.raises(UserError, match=r"begins a conversation with '</s>', which without a pad token fills blocks"):
        Chats(replace(first, eos="</s>"), tmp_path / "first", pad=None, packing="concat")


def test_later_prompts_that_a_server_would_cut_otherwise_are_said(chats: Any) -> None:
    said = chats("qwen").prove([USER, ("assistant", "\n\nDorme."), USER, SAID])
    assert "in 1 conversation of a sample; before 1 later answer a server, which encodes what was said as one" in said


def test_texts_like_control_tokens_are_left_out_of_the_proof_and_said(chats: Any) -> None:
    said = chats("qwen").prove([USER, SAID], [USER, ("assistant", "<|im_end|>")])
    assert said.endswith("in 1 conversation of a sample (1 more hold text like control tokens)")


def test_what_a_model_writes_of_its_answer_is_no_control_token(tmp_path: Path) -> None:
    """Qwen 3 heads a last answer without reasoning with an empty block."""
    block = "{%- if loop.index0 > ns.asked -%}{%- set c = '<think>\\n\\n</think>\\n\\n' + c -%}{%- endif -%}"
    role = "{{- '<|im_start|>' + m.role"
    family = replace(
        FAMILIES["qwen"],
        template=FAMILIES["qwen"].template.replace(
            role, "{%- if m.role == 'assistant' and not '<think>' in c -%}" + block + "{%- endif -%}\n" + role
        ),
    )
    made = Chats(family, tmp_path)
    assert made.template.control == []
    assert made.learned([USER, SAID]).startswith("<think>\n\n</think>\n\nDorme.")
    thought = [USER, ("assistant", "<think>\nconto\n</think>\n\nCinque.")]
    assert made.learned(thought) == "<think>\nconto\n</think>\n\nCinque.<|im_end|>"
    assert "in 1 conversation of" in made.prove(thought)


def test_a_conversation_may_begin_with_an_answer(chats: Any) -> None:
    assert "in 1 conversation of" in chats("deepseek").prove([("assistant", "Ciao."), *TWICE])


def test_an_answer_whose_beginning_its_template_cuts_off_rejects_the_row(tmp_path: Path) -> None:
    cut = FAMILIES["deepseek"].template.replace(
        "'<｜Assistant｜>' + m.content", "'<｜Assistant｜>' + m.content.split('</think>')[-1]"
    )
    made = Chats(replace(FAMILIES["deepseek"], template=cut), tmp_path)
    assert made.why([USER, ("assistant", "<think>conto</think>Cinque.")]) == "lost:assistant"
    assert made.learned([USER, SAID]) == "Dorme.<｜end｜>"


def test_a_template_without_a_prompt_is_said_to_teach_its_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = replace(FAMILIES["smol"], template=FAMILIES["smol"].template.replace("add_generation_prompt", "false"))
    Chats(family, tmp_path / "none")
    assert "warning: its chat template does nothing for `add_generation_prompt`" in capsys.readouterr().err
    for name in ("smol", "mistral"):
        Chats(FAMILIES[name], tmp_path / name)
    assert "warning" not in capsys.readouterr().err


def test_the_name_of_a_tool_stands_in_its_call(chats: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "meteo", "arguments": {}}}]}
    said = {"role": "tool", "name": "meteo", "content": "sole"}
    assert chats("llama").read([USER, call, said, SAID], tools=[{"name": "meteo"}]).pieces


_BITS = [
    "Il gatto",
    " ",
    "\n\n",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>",
    "<|im_end",
    "im_end|>",
    "|>",
    "</s>",
    "[INST]",
]
_TEXTS = st.lists(st.sampled_from([*_BITS, "<|eot_id|>", "\u3000", "{{ 1 }}", "😀", "<", "a"]), max_size=4).map("".join)
_TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), _TEXTS), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(_TURNS, st.booleans())
def test_a_rendering_is_that_of_transformers(turns: list[tuple[str, str]], prompt: bool) -> None:
    """The renderer goes around what takes `transformers` longest; so does its sandbox for keys of messages."""
    messages = [{"role": role, "content": text, "items": "x"} for role, text in turns]
    for name, chats in _renderers().items():
        loaded = loaded_tokenizer(chats.settings.tokenizer)
        try:
            served = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except jinja2.exceptions.TemplateError:
            served = None
        assert chats.reader.chats is not None
        assert chats.reader.chats.renderer.render_or_none(messages, None, prompt) == served, name


@cache
def _renderers() -> dict[str, Chats]:
    scratch = Path(tempfile.mkdtemp(prefix="chimera-renderers-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    odd = "{{ messages[0].items is callable }}{{ messages[0].keys()|list|length }}{{ messages[0].none is defined }}"
    families = {**FAMILIES, "odd": replace(FAMILIES["smol"], template=FAMILIES["smol"].template + odd)}
    names = ("qwen", "gemma", "llama", "zephyr", "odd")
    return {name: Chats(families[name], scratch / name) for name in names}
