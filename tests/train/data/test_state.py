"""Which checkpoints a run may take up: what their weights mean must be as it was."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig

from chimera.train.data.state import StateMismatch, check_model


def about(
    words: str = "end pad the cat", scaling: Any = None, positions: int = 128, vocab_size: int = 128, **changes: Any
) -> dict[str, Any]:
    """What `callbacks.About` keeps of a small llama."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"vocab_size": vocab_size, "max_position_embeddings": positions}
    config = AutoConfig.for_model("llama", rope_scaling=scaling, **sizes)
    ids = {word: number for number, word in enumerate(words.split())}
    return {
        "model_config": config.to_json_string(use_diff=False),
        "tokenizer": Tokenizer(WordLevel(ids, unk_token="the")).to_str(),
        "eos_token": "end",
        "pad_token": "pad",
        "train_on": "all",
        "document_mask": True,
        **changes,
    }


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("new", "message"),
    [
        (about(eos_token="pad"), "eos_token 'pad' and not 'end' for one"),
        (about("end pad cat the"), "token 2 for one"),
        (about("end pad the"), "token 3 for one"),
        (about("end pad the", model_config=about(vocab_size=256)["model_config"]), "token 3 for one"),
    ],
)
def test_another_tokenizer_is_refused(own: bool, new: dict[str, Any], message: str) -> None:
    """Ids, or the ends of documents, would mean something else; shards made by others do not show it."""
    with pytest.raises(StateMismatch, match=rf"not the one the checkpoint \(step 5\) was trained with, {message}"):
        check_model(about(), new, 5, own)


def test_what_leaves_the_ids_as_they_are_is_no_other_tokenizer() -> None:
    check_model(about(), about() | {"tokenizer": about()["tokenizer"] + "\n"}, 5, True)
    check_model(about(), about("end pad the cat dog"), 5, True)  # of which no text trained on had one
    check_model({key: value for key, value in about().items() if key != "tokenizer"}, about("a b c"), 5, True)
    check_model(about(pad_token="end"), about(pad_token=None), 5, True)  # shards made by others, then some of ours


def test_more_positions_are_refused_where_they_scale_the_rotation() -> None:
    check_model(about(), about(positions=256), 5, True)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(StateMismatch, match=r"max_position_embeddings is 256, .* was trained with 128"):
        check_model(about(scaling=yarn), about(scaling=yarn, positions=256), 5, True)
