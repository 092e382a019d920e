"""The model: documents see only themselves; the loss is a mean over tokens however a batch is cut."""

import contextlib

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from chimera.cli import UserError
from chimera.train.settings import TrainSettings
from chimera.train.step.collate import IGNORED, trained_tokens
from chimera.train.step.configuration import check_tokens
from chimera.train.step.model import CausalLM, Perplexity, TokenLoss, build_model, token_losses
from chimera.train.step.model_checks import check_causal, check_document_mask
from tests.train.conftest import flex_uncompiled

FROM_5 = int(transformers.__version__.split(".")[0]) >= 5

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(attention: str = "sdpa", **changes) -> CausalLM:
    torch.manual_seed(0)
    settings = TrainSettings(model={**TINY, **changes}, attn_implementation=attention)
    return build_model(settings, vocab_size=100, eos_id=0, pad_id=1).eval()


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 100, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": places}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_documents_in_one_sequence_do_not_see_each_other(attention, monkeypatch):
    on_cpu = attention == "flex_attention" and not torch.cuda.is_available()
    with monkeypatch.context() as patch:
        if on_cpu:
            patch.setattr(torch.cuda, "is_available", lambda: True)
        model = tiny(attention)
    with flex_uncompiled() if on_cpu else contextlib.nullcontext():
        check_own_logits(model)


def check_own_logits(model: CausalLM, tolerance: float = 1e-5) -> None:
    """Of three documents in one sequence, each has the logits it has alone."""
    lengths = [7, 12, 5]
    batch = packed(lengths)
    first = 0
    with torch.no_grad():
        together = model(batch)[0]
        for n in lengths:
            here = slice(first, first + n)
            alone = model({name: value[:, here] for name, value in batch.items()})[0]
            assert torch.allclose(together[here], alone, atol=tolerance)
            first += n


# Model types whose documents are told apart by `position_ids`, in every version of transformers that has them.
FAMILIES = ["arcee", "aria_text", "bitnet", "cohere", "cohere2", "diffllama", "dots1", "ernie4_5", "exaone4"]
FAMILIES += ["flex_olmo", "gemma", "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "helium", "hunyuan_v1_dense"]
FAMILIES += ["lfm2", "llama", "mistral", "ministral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2"]
FAMILIES += ["qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"]
# In transformers 5 alone: 4 drops the mask it derives from `position_ids`.
SINCE_5 = ["falcon", "gpt2", "granitemoe", "nemotron", "persimmon", "qwen2_moe", "stablelm"]
SMALL = {**TINY, "head_dim": 8, "pad_token_id": 1}
SMALL |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16}
SMALL |= {"shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
SMALL |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2}


def small(model_type: str) -> CausalLM:
    """A model of any type with a few thousand parameters."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    known = AutoConfig.for_model(model_type).to_dict()
    torch.manual_seed(0)
    options = {key: value for key, value in SMALL.items() if key in known}
    return build_model(TrainSettings(model={**options, "model_type": model_type}), 100, eos_id=0, pad_id=1).eval()


@pytest.mark.parametrize("model_type", [*FAMILIES, *SINCE_5])
def test_every_familys_documents_have_their_own_logits(model_type):
    model = small(model_type)
    if model_type in SINCE_5 and not FROM_5:
        pytest.skip("transformers 4 drops the mask")
    check_causal(model, 16)
    check_document_mask(model, 16)
    check_own_logits(model)


def test_sequences_laid_in_one_row_give_the_same_logits():
    model = tiny()
    batch = {name: value.view(2, -1) for name, value in packed([7, 5, 12]).items()}
    with torch.no_grad():
        apart = model(batch)
        model.in_one_row = True  # as flash attention needs them
        assert torch.allclose(model(batch), apart, atol=1e-5)


@pytest.mark.parametrize("seq_len", [3, 16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_a_document_mask_that_works_passes(model_type, seq_len):
    check_document_mask(tiny(model_type=model_type).train(), seq_len)


@pytest.mark.parametrize("model_type", ["biogpt", "opt", "qwen3_next", *SINCE_5])
def test_a_document_mask_without_effect_is_refused(model_type):
    model = small(model_type)
    if model_type in SINCE_5 and FROM_5:
        pytest.skip("transformers 5 tells its documents apart")
    with pytest.raises(UserError, match=f"no effect on `{model_type}` with `attn_implementation: sdpa`"):
        check_document_mask(model, 16)


def test_a_model_without_sdpa_is_told_what_to_set():
    if not FROM_5:
        pytest.skip("transformers 4 has it")
    known = AutoConfig.for_model("gemma2").to_dict()
    model = {key: value for key, value in SMALL.items() if key in known} | {"model_type": "gemma2"}
    with pytest.raises(UserError, match=r"sdpa`: a Gemma2ForCausalLM of .* has none: set `attn_implementation=eager`"):
        build_model(TrainSettings(model=model), 100, eos_id=0, pad_id=1)
    eager = build_model(TrainSettings(model=model, attn_implementation="eager"), 100, eos_id=0, pad_id=1).eval()
    check_document_mask(eager, 16)
    check_own_logits(eager)


BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("seq_len", [2, 3, 64])
def test_a_model_that_sees_what_follows_is_refused(seq_len):
    def build(**model):
        torch.manual_seed(0)
        return build_model(TrainSettings(model=model), vocab_size=100, eos_id=0, pad_id=1)

    with pytest.raises(UserError, match=r"a `bert` model sees the tokens that follow .*`is_decoder: true`"):
        check_causal(build(**BERT), seq_len)
    for causal in ({**BERT, "is_decoder": True}, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}, TINY):
        check_causal(build(**causal), seq_len)


def test_without_restarting_positions_documents_do_see_each_other():
    model = tiny()
    batch = packed([7, 12])
    whole = {**batch, "position_ids": torch.arange(19)[None]}
    with torch.no_grad():
        assert not torch.allclose(model(batch)[0, 7:], model(whole)[0, 7:], atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_loss_weighted_by_tokens_is_the_same_for_any_microbatch(size):
    model = tiny()
    ids = torch.randint(2, 100, (8, 16), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.rand(8, 16, generator=torch.Generator().manual_seed(3)) < 0.5, ids, IGNORED)
    places = torch.arange(16).expand(8, 16)
    batch = {"input_ids": ids, "labels": labels, "position_ids": places}
    with torch.no_grad():
        whole = model.loss(model(batch), batch)
        total = torch.zeros(())
        for i in range(0, 8, size):
            part = {name: value[i : i + size] for name, value in batch.items()}
            total += model.loss(model(part), part) * trained_tokens(part["labels"]) / trained_tokens(labels)
    assert torch.allclose(whole, total, rtol=1e-6)


def test_loss_of_a_batch_without_trained_tokens_is_zero_not_nan():
    model = tiny()
    batch = packed([4])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert model.loss(model(batch), batch) == 0


def test_token_losses_are_those_of_transformers():
    model = tiny()
    batch = packed([16])
    with torch.no_grad():
        theirs = model.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        ours = model.loss(model(batch), batch)
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_metrics_are_means_over_tokens_of_all_batches():
    loss, perplexity = TokenLoss(), Perplexity()
    logits = torch.randn(3, 8, 50, generator=torch.Generator().manual_seed(4))
    labels = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(5))
    labels[0, 2:] = IGNORED
    for rows in (slice(0, 1), slice(1, 3)):
        loss.update(logits[rows], labels[rows])
        perplexity.update(logits[rows], labels[rows])
    expected = token_losses(logits, labels).sum() / trained_tokens(labels)
    assert torch.allclose(loss.compute(), expected)
    assert torch.allclose(perplexity.compute(), expected.exp())


def test_vocabulary_is_padded_to_a_multiple_of_128():
    assert tiny().model.config.vocab_size == 128
    assert tiny(vocab_size=200).model.config.vocab_size == 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="they work on a GPU")
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_needs_a_gpu_is_refused_without_one(attention):
    with pytest.raises(UserError, match=f"`attn_implementation: {attention}` needs a GPU"):
        tiny(attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 99}, "model.vocab_size"),
        ({"hiden_size": 32}, "model.hiden_size"),
        ({"model_type": "lama"}, "lama"),
        ({"pretrained": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_wrong_model_setting_is_named(change, message):
    with pytest.raises(UserError, match=message):
        tiny(**change)


def test_weights_are_float32_whatever_the_configuration_says():
    assert {p.dtype for p in tiny(torch_dtype="bfloat16").parameters()} == {torch.float32}


def test_logits_are_found_whatever_the_configuration_returns():
    ids = torch.arange(8)[None]
    assert tiny(return_dict=False).logits({"input_ids": ids, "position_ids": ids}).shape == (1, 8, 128)


def test_a_model_is_read_from_a_local_folder_and_its_vocabulary_grown(tmp_path):
    first = tiny()
    first.model.save_pretrained(tmp_path)
    settings = TrainSettings(model={"pretrained": str(tmp_path)})
    again = build_model(settings, vocab_size=300, eos_id=0, pad_id=1)
    assert again.model.get_input_embeddings().num_embeddings == 384
    old = first.model.get_input_embeddings().weight
    assert torch.equal(again.model.get_input_embeddings().weight[:128], old)


def test_a_model_folder_says_itself_what_it_is(tmp_path):
    tiny().model.save_pretrained(tmp_path)

    def build(**options):
        return build_model(TrainSettings(model={"pretrained": str(tmp_path), **options}), 100, eos_id=0, pad_id=1)

    with pytest.raises(UserError, match=r"num_attention_heads \(8 here, 4 there\), rotary \(1 here, None there\)"):
        build(num_attention_heads=8, rotary=1, attention_dropout=0.1, hidden_size=None)
    assert build(attention_dropout=0.1, num_attention_heads=None).model.config.attention_dropout == 0.1


def test_null_takes_back_what_a_base_says_for_another_model_type():
    with pytest.raises(UserError, match=r"model\.rotary` is unknown .* set it to null"):
        tiny(rotary=1)
    assert tiny(rotary=None).model.config.model_type == "llama"


def test_a_token_beyond_the_vocabulary_is_found_before_training():
    check_tokens({"a": 99}, 100)
    with pytest.raises(UserError, match="stream `a` holds token id 100"):
        check_tokens({"a": 100}, 100)
