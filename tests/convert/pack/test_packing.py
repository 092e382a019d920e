"""Blocks hold every token once and in order, whatever the packing and wherever the work is interrupted."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.pack.packing import MOST_WAITING, Packer, best_fit_decreasing
from chimera.convert.stream_settings import PACKINGS, StreamSettings
from tests.convert.small_tokenizer import END, encoder

PAD, EOS = 0, 1
BLOCK = 8

packings = st.sampled_from(PACKINGS)
lengths = st.lists(st.integers(1, 3 * BLOCK), max_size=40)


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different (and neither PAD nor EOS), each ending with EOS."""
    starts = np.cumsum([2, *lengths])
    return [np.array([*range(a, a + n - 1), EOS], dtype=np.uint32) for a, n in zip(starts, lengths, strict=False)]


def packer(packing: str, masked: bool = False, window: int = 4) -> Packer:
    return Packer(BLOCK, PAD, packing, dtype=np.uint32, masked=masked, window=window)


def packed(lengths: list[int], packing: str, **options: Any) -> tuple[np.ndarray, int]:
    """All blocks of one part and their padding."""
    p = packer(packing, **options)
    for ids in documents(lengths):
        p.add(ids)
    p.flush()
    blocks, masks, padding = p.take()
    assert masks is None
    return blocks, padding


def split(block: np.ndarray) -> list[list[int]]:
    """The documents, or pieces of one, of a block without its padding."""
    tokens = block[: len(block) - int((block == PAD).sum())].tolist()
    ends = [0, *(i + 1 for i, token in enumerate(tokens) if token == EOS)]
    pieces = [tokens[a:b] for a, b in pairwise(ends)]
    return pieces + ([tokens[ends[-1] :]] if ends[-1] < len(tokens) else [])


@given(lengths, packings)
def test_several_texts_at_once_give_the_blocks_of_one_after_another(lengths: list[int], packing: str) -> None:
    p, found = packer(packing), documents(lengths)
    p.add_texts(np.concatenate([np.zeros(0, np.uint32), *found]), np.cumsum([0, *lengths]))
    p.flush()
    assert np.array_equal(p.take()[0], packed(lengths, packing)[0])


@given(lengths, packings)
def test_every_token_comes_once_and_padding_only_at_block_ends(lengths: list[int], packing: str) -> None:
    blocks, padding = packed(lengths, packing)
    assert blocks.dtype == np.uint32
    assert blocks.shape[1:] == (BLOCK,)
    assert padding == (blocks == PAD).sum()
    for block in blocks:
        real = block != PAD
        assert real[0]
        assert not (np.diff(real.astype(int)) > 0).any()
    expected = np.concatenate(documents(lengths)) if lengths else np.empty(0)
    assert sorted(blocks[blocks != PAD].tolist()) == sorted(expected.tolist())


@given(lengths)
def test_concat_is_the_documents_one_after_another(lengths: list[int]) -> None:
    blocks, padding = packed(lengths, "concat")
    expected = np.concatenate([*documents(lengths), np.full(padding, PAD)])
    assert padding < BLOCK
    assert np.array_equal(blocks.ravel(), expected)


@given(lengths)
def test_none_gives_each_document_its_own_blocks(lengths: list[int]) -> None:
    blocks, _ = packed(lengths, "none")
    pieces = [split(block) for block in blocks]
    assert all(len(piece) == 1 for piece in pieces)
    expected = [ids[i : i + BLOCK].tolist() for ids in documents(lengths) for i in range(0, len(ids), BLOCK)]
    assert [piece[0] for piece in pieces] == expected


@given(lengths, st.integers(1, 6))
def test_best_fit_cuts_only_what_does_not_fit_a_block(lengths: list[int], window: int) -> None:
    blocks, _ = packed(lengths, "best_fit", window=window)
    found = sorted(piece for block in blocks for piece in split(block))
    expected = sorted(ids[i : i + BLOCK].tolist() for ids in documents(lengths) for i in range(0, len(ids), BLOCK))
    assert found == expected


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The number of bins of the textbook algorithm."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@given(st.lists(st.integers(1, 50), max_size=120))
def test_bins_are_as_few_as_best_fit_decreasing_makes(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= 50 for bin_ in bins)
    assert len(bins) == plain_best_fit_decreasing(lengths, 50)
    assert bins == sorted(sorted(bin_) for bin_ in bins)


def test_a_bounded_window_packs_almost_as_well_as_all_documents_at_once() -> None:
    rng = np.random.default_rng(3)
    lengths = np.minimum(rng.lognormal(5, 0.8, 20_000).astype(int) + 1, 1024).tolist()
    p = Packer(1024, PAD, "best_fit", dtype=np.uint32)
    for ids in documents(lengths):
        p.add(ids)
    p.flush()
    blocks, _, padding = p.take()
    assert len(blocks) <= 1.005 * plain_best_fit_decreasing(lengths, 1024)
    assert padding / blocks.size < 0.01


def test_a_window_of_long_blocks_is_bounded() -> None:
    p = Packer(1 << 22, PAD, "best_fit", dtype=np.uint32)
    for _ in range(20):
        p.add(np.ones(1 << 20, np.uint32))
        assert p.state()["waiting"].size < MOST_WAITING
    assert len(p.take()[0]) == 4


@given(lengths, packings, st.booleans(), st.data())
def test_blocks_do_not_depend_on_when_they_are_taken_or_on_interruptions(
    lengths: list[int], packing: str, masked: bool, data: st.DataObject
) -> None:
    docs = documents(lengths)
    masks = [ids % 3 == 0 if masked else None for ids in docs]
    straight, broken = packer(packing, masked), packer(packing, masked)
    taken: list[Any] = []
    for ids, mask in zip(docs, masks, strict=True):
        straight.add(ids, mask)
        broken.add(ids, mask)
        if data.draw(st.booleans(), label="take"):
            taken.append(broken.take())
        if data.draw(st.booleans(), label="interrupt"):
            state = broken.state()
            broken = packer(packing, masked)
            broken.add(docs[0], masks[0])  # is forgotten
            broken.restore({key: value.copy() for key, value in state.items()})
    straight.flush()
    broken.flush()
    taken.append(broken.take())
    blocks, expected_masks, padding = straight.take()
    assert np.array_equal(np.concatenate([tokens for tokens, _, _ in taken]), blocks)
    assert sum(p for _, _, p in taken) == padding
    if masked:
        assert expected_masks is not None
        assert np.array_equal(np.concatenate([mask for _, mask, _ in taken]), expected_masks)
        assert np.array_equal(expected_masks, (blocks % 3 == 0) & (blocks != PAD))


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_the_assistant_says_is_marked_in_the_blocks(packing: str) -> None:
    """Conversations longer and shorter than a block: the masked tokens are the answers, each with its closing token."""
    encode = encoder()
    reader = DocumentReader(StreamSettings(format="chatml"), encode.special_ids)
    answers = [f"{i} volte {i}: la casa bianca e il gatto. " * i for i in range(1, 9)]
    documents = [reader.read({"instruction": f"Conta fino a {i}", "output": a}) for i, a in enumerate(answers)]
    p = Packer(32, encode.pad_id, packing, dtype=encode.dtype, masked=True)
    for ids, mask in encode.encode([d for d in documents if isinstance(d, Document)]):
        p.add(ids, mask)
    p.flush()
    blocks, masks, _ = p.take()
    assert masks is not None
    found = encode.decode(blocks[masks].tolist())
    if packing == "best_fit":  # blocks hold the documents in another order, long ones cut
        assert sorted(found) == sorted("".join(a + END for a in answers))
    else:
        assert found == "".join(a + END for a in answers)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="best_fit"):
        packer("fold")
    with pytest.raises(ValueError, match="masked"):
        packer("concat").add(np.array([2, EOS]), np.array([True, False]))
    with pytest.raises(ValueError, match="masked"):
        packer("concat", masked=True).add(np.array([2, EOS]))
