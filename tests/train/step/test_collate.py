"""Blocks → sequences, labels, position ids."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.train.step.collate import (
    IGNORED,
    LabelRules,
    StepInfo,
    cut_tokens,
    document_starts,
    positions,
    view_sequences,
)

EOS, PAD = 0, 1


def rules(train_on: str = "all", document_mask: bool = True) -> LabelRules:
    return LabelRules(EOS, PAD, train_on, document_mask)


def batch_of(blocks, seq_len, first=0, sequences=None, assistant=None, unpacked=None):
    tokens = torch.tensor(blocks)
    count = tokens.numel() // seq_len - first if sequences is None else sequences
    info = StepInfo(0, "p", seq_len, "d", {}, first, count, tuple(unpacked or [False] * len(blocks)))
    said = None if assistant is None else torch.tensor(assistant, dtype=torch.bool)
    return {"tokens": tokens, "assistant": said, "info": info}


def test_a_block_is_viewed_as_sequences_without_losing_a_token():
    blocks = [[5, 6, 7, 0, 8, 9, 10, 11], [12, 13, 0, 14, 15, 16, 17, 18]]
    views = view_sequences(batch_of(blocks, 4), rules())
    assert views["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11], [12, 13, 0, 14], [15, 16, 17, 18]]


def test_bos_is_seen_and_not_learned_and_predicts_the_first_token():
    bos = 2  # of texts, and the last EOS fills a block without a padding token up
    views = view_sequences(batch_of([[bos, 5, 6, EOS, bos, 7, EOS, EOS]], 8), LabelRules(EOS, -1, "all", True))
    assert views["labels"][0, 1:].tolist() == [5, 6, EOS, IGNORED, 7, EOS, IGNORED]
    assert views["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_a_rank_views_only_its_slice():
    blocks = [[5, 6, 7, 8, 9, 10, 11, 12]]
    views = view_sequences(batch_of(blocks, 2, first=1, sequences=2), rules())
    assert views["input_ids"].tolist() == [[7, 8], [9, 10]]


def test_labels_skip_padding_and_each_documents_first_token():
    views = view_sequences(batch_of([[5, 6, 0, 7, 8, 0, 1, 1]], 8), rules())
    assert views["labels"].tolist() == [[5, 6, 0, IGNORED, 8, 0, IGNORED, IGNORED]]


def test_positions_restart_at_documents_and_sequences():
    blocks = [[5, 6, 0, 7, 8, 9, 0, 3]]
    assert view_sequences(batch_of(blocks, 4), rules())["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    whole = view_sequences(batch_of(blocks, 4), rules(document_mask=False))
    assert whole["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_where_documents_start_is_said_by_the_masks_of_blocks_that_say_so():
    """Of the first two blocks; behind another EOS one always starts."""
    blocks = [[5, 6, 0, 7, 8, 0, 9, 10], [5, 0, 0, 7, 8, 0, 1, 1], [5, 6, 0, 7, 8, 0, 9, 10]]
    said = [[False] * 6 + [True, False], [False] * 8, [False] * 8]
    batch = batch_of(blocks, 8, assistant=said)
    batch["info"] = replace(batch["info"], starts=(True, True, False))
    views = view_sequences(batch, rules())
    assert [n for n, label in enumerate(views["labels"][0].tolist()) if label == IGNORED] == [6]
    assert views["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 0, 1, 2, 3, 0, 1],
        [0, 1, 2, 0, 1, 2, 0, 1],
    ]
    halves = view_sequences({**batch, "info": replace(batch["info"], seq_len=4, sequences=6)}, rules())
    assert halves["position_ids"].tolist()[:2] == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_padding_after_an_unended_piece_is_a_document_of_its_own():
    views = view_sequences(batch_of([[5, 6, 7, 8, 9, 1, 1, 1]], 8), rules())
    assert views["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_train_on_assistant_masks_the_user_but_not_text_streams():
    blocks = [[5, 6, 7, 8], [5, 6, 7, 8]]
    said = [[False, False, True, True], [True, True, True, True]]  # the second block is text
    labels = view_sequences(batch_of(blocks, 4, assistant=said), rules("assistant"))["labels"]
    assert labels.tolist() == [[IGNORED, IGNORED, 7, 8], [5, 6, 7, 8]]
    assert view_sequences(batch_of(blocks, 4, assistant=said), rules())["labels"].tolist() == blocks


def test_single_document_blocks_are_padded_only_to_the_longest():
    blocks = [[5, 6, 0, 1, 1, 1, 1, 1], [5, 6, 7, 8, 0, 1, 1, 1]]
    views = view_sequences(batch_of(blocks, 8, unpacked=[True, True]), rules())
    assert views["input_ids"].shape == (2, 5)
    mixed = view_sequences(batch_of(blocks, 8, unpacked=[True, False]), rules())
    assert mixed["input_ids"].shape == (2, 8)


def test_tokens_parted_from_their_document_are_counted():
    blocks = [[5, 6, 7, 8, 9, 0, 1, 1], [5, 6, 7, 8, 9, 10, 11, 0]]
    assert cut_tokens(batch_of(blocks, 4, unpacked=[True, False]), PAD) == 2  # 9 and EOS of the first block
    assert cut_tokens(batch_of(blocks, 8, unpacked=[True, False]), PAD) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=8, max_size=8), min_size=1, max_size=3), st.sampled_from([2, 4, 8])
)
def test_positions_and_starts_agree_with_a_plain_loop(blocks, seq_len):
    views = view_sequences(batch_of(blocks, seq_len), rules())
    for ids, places in zip(views["input_ids"].tolist(), views["position_ids"].tolist(), strict=True):
        expected, count = [], 0
        for t, token in enumerate(ids):
            before = ids[t - 1] if t else None
            start = t > 0 and (before == EOS or (token == PAD and before != PAD)) and not (token == before == PAD)
            count = 0 if start or t == 0 else count + 1
            expected.append(count)
        assert places == expected


@pytest.mark.parametrize("same", [0, 1])
def test_padding_with_the_eos_id_counts_as_one_run(same):
    foreign = LabelRules(same, same, "all", True)
    starts = document_starts(torch.tensor([[5, 6, same, same, same]]), foreign)
    assert positions(starts).tolist()[0][3:] != [0, 0]
