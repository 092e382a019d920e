"""Templates that end turns with EOS: where documents start is stored, and training tells them apart by that."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chimera
from chimera.cli import UserError
from chimera.commands import inspect_batch, verify_shards
from chimera.convert.encode.document import Document
from chimera.mds import ShardFormat, index_bytes, write_shard
from chimera.train.data.index import read_index
from chimera.train.data.shards import open_shards
from chimera.train.run.evaluate import EvalBlocks
from chimera.train.step.collate import LabelRules
from chimera.train.step.model import build_model
from tests.convert import builds
from tests.convert.build.test_template_builds import rows
from tests.convert.encode.chat_families import FAMILIES, Chats, Family
from tests.convert.small_tokenizer import EOS, PAD

LEN = 176  # more than the longest document

END = "</s>"
MISTRAL = dataclasses.replace(FAMILIES["mistral"], eos=END)
# One special token for all: it begins conversations, ends turns and ends texts.
SINGLE = Family(
    "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
    (),
    named={"bos_token": EOS},
)


TEXTS = [f"Il gatto {i} dorme. " * (3 + i % 5) for i in range(40)]


def build(
    folder: Path, family: Family = MISTRAL, block_len: int = LEN, pad: str | None = PAD, **chat: Any
) -> dict[str, Any]:
    """Shards at `folder/out`: conversations of one to four answers, and a stream of texts."""
    folder.mkdir(exist_ok=True)
    (folder / "chats.jsonl").write_bytes(builds.jsonl(rows()))
    (folder / "texts.jsonl").write_bytes(builds.jsonl({"text": text} for text in TEXTS))
    tokenizer = {"path": str(family.write(folder / "tokenizer")), "eos_token": family.eos, "pad_token": pad}
    stream = {"format": "chat", "template": "tokenizer", "min_tokens": 1, "packing": "best_fit", **chat}
    streams = {
        "chat": {**stream, "sources": [{"files": [str(folder / "chats.jsonl")]}]},
        "text": {"packing": chat.get("packing", "best_fit"), "sources": [{"files": [str(folder / "texts.jsonl")]}]},
    }
    given = builds.config(folder, folder / "out", part_bytes=3000, streams=streams, tokenizer=tokenizer)
    return builds.build_here({**given, "block_len": block_len})


def config(folder: Path, *more: str, lengths: str = f"{{from_step: 0, seq_len: {LEN}}}") -> Any:
    words = [f"shards={folder}/out", f"cache={folder}/cache", f"save_folder={folder}/run", "run_name=x", *more]
    model = "model={model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, "
    model += f"num_attention_heads: 2, max_position_embeddings: {LEN}}}"
    (folder / "train.yaml").write_text(
        "global_train_batch_size: 8\nphases: [{name: p, steps: 12, proportions: {chat: 0.5, text: 0.5}}]\n"
        f"curriculum: {{mode: sequences, stages: [{lengths}]}}\n"
    )
    return chimera.read_config(folder / "train.yaml", [*words, model])


def documents_of(family: Family, folder: Path, **stream: Any) -> list[tuple[int, ...]]:
    """The ids of the documents of the conversations and the texts."""
    made = Chats(family, folder / "alone", **stream)
    found: Any = [made.reader.read(row) for row in rows()]
    texts = [Document((text.encode(),)) for text in TEXTS]
    chats = [each for document in found for each in (document, *document.more)]
    return [tuple(ids.tolist()) for some in (chats, texts) for ids, _ in made.encoder.encode(some)]


def seen(batch: Any, pad: int) -> list[tuple[int, ...]]:
    """The documents of a batch as attention tells them apart, without padding."""
    found = []
    for ids, places in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = (places == 0).nonzero().flatten().tolist()
        found += [tuple(part.tolist()) for part in torch.tensor_split(ids, starts[1:]) if int(part[0]) != pad]
    return found


@pytest.mark.parametrize("turns", ["all", "each"])
@pytest.mark.parametrize("family", [MISTRAL, SINGLE, FAMILIES["zephyr"]], ids=["mistral", "single", "zephyr"])
def test_attention_sees_whole_documents_and_no_other(family: Family, turns: str, tmp_path: Path) -> None:
    manifest = build(tmp_path, family, turns=turns, too_long="turns")
    verify_shards.verify_shards(tmp_path / "out")
    assert manifest["format"] == 2
    assert manifest["streams"]["chat"]["template"]["eos_inside"] is True
    eos, pad = manifest["tokenizer"]["eos_id"], manifest["tokenizer"]["pad_id"]
    known = documents_of(family, tmp_path, turns=turns)
    assert max(map(len, known)) <= LEN
    found = [each for batch in chimera.batches(config(tmp_path)) for each in seen(batch, pad)]
    assert {*found} <= {*known}
    assert len({*found}) > 0.5 * len({*known})  # the rest are in the eval split, or later
    assert any(ids.count(eos) > 3 for ids in found) or turns == "each"


def test_a_document_has_the_logits_that_it_has_alone(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    eos, pad, size = (manifest["tokenizer"][key] for key in ("eos_id", "pad_id", "vocab_size"))
    settings = config(tmp_path)
    torch.manual_seed(0)
    model = build_model(settings, size, eos, pad).eval()
    batch = next(iter(chimera.batches(settings)))
    with torch.no_grad():
        logits = model(batch)
        for row in range(len(logits)):
            first = 0
            one = {name: batch[name][row : row + 1] for name in ("input_ids", "position_ids")}
            for ids in seen(one, -1):
                alone = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
                assert torch.allclose(logits[row, first : first + len(ids)], model(alone)[0], atol=1e-5)
                first += len(ids)


def pieces(root: Path, stream: str = "chat") -> list[tuple[int, tuple[int, ...]]]:
    """What attention sees as documents in a stream's blocks of `train`, each with its place in its block."""
    shards = open_shards(str(root), "")
    tokens, masks = (np.concatenate(each) for each in zip(*read(root, stream), strict=True))
    rules = LabelRules(shards.tokenizer.eos_id, shards.tokenizer.pad_id, "all", True)
    blocks = EvalBlocks(
        tokens.astype(np.int64), masks, tokens.shape[1], len(tokens), rules, shards.streams[stream].starts
    )
    (batch,) = blocks
    found = []
    for ids, places in zip(batch["input_ids"].numpy(), batch["position_ids"].numpy(), strict=True):
        starts = np.flatnonzero(places == 0)
        parts = np.split(ids, starts[1:])
        found += [
            (int(at), tuple(part.tolist())) for at, part in zip(starts, parts, strict=True) if part[0] != rules.pad_id
        ]
    return found


def read(root: Path, stream: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens and the masks of each of a stream's shards."""
    where, folder = verify_shards.Root(str(root)), f"{stream}/train"
    form = verify_shards.read_manifest(where).shard_format(stream)
    shards = json.loads((root / folder / "index.json").read_bytes())["shards"]
    found: Any = [verify_shards.read_shard(where, folder, shard, form) for shard in shards]
    return found


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize("family", [MISTRAL, SINGLE, FAMILIES["zephyr"]], ids=["mistral", "single", "zephyr"])
def test_what_is_cut_off_a_long_conversation_goes_on_with_no_other(
    family: Family, packing: str, tmp_path: Path
) -> None:
    build(tmp_path, family, block_len=32, packing=packing)
    verify_shards.verify_shards(tmp_path / "out")
    known, found = documents_of(family, tmp_path)[:60], pieces(tmp_path / "out")
    for at, piece in found:
        places = [(ids, n) for ids in known for n in range(len(ids)) if ids[n : n + len(piece)] == piece]
        begins = (0, *range(0, 1000, 32)) if packing != "concat" else range(1000) if at == 0 else (0,)
        assert any(n in begins and (n + len(piece) == len(ids) or at + len(piece) == 32) for ids, n in places)
    assert any(at and len(piece) > 1 for at, piece in found) or packing == "none"


def test_blocks_are_filled_with_eos_where_there_is_no_padding(tmp_path: Path) -> None:
    bare = dataclasses.replace(SINGLE, template=SINGLE.template.removeprefix("{{ bos_token }}"))
    build(tmp_path, bare, pad=None, packing="concat")
    verify_shards.verify_shards(tmp_path / "out")
    known = {*documents_of(bare, tmp_path)}
    eos = next(iter(known))[-1]
    found = [piece for at, piece in pieces(tmp_path / "out") if at and at + len(piece) < LEN and piece != (eos,)]
    assert found
    assert {*found} <= known


def test_a_conversation_that_is_ended_early_has_one_end(tmp_path: Path) -> None:
    build(tmp_path, block_len=48, too_long="turns")
    verify_shards.verify_shards(tmp_path / "out")
    known = documents_of(MISTRAL, tmp_path)
    found = [piece for _, piece in pieces(tmp_path / "out")]
    assert all(any(ids[: len(piece)] == piece for ids in known) for piece in found)
    assert any(piece not in known for piece in found)
    assert all(piece[-2:] != piece[-1:] * 2 for piece in found)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_start_that_is_not_stored_is_found(packing: str, tmp_path: Path) -> None:
    build(tmp_path, packing=packing)
    root, form = tmp_path / "out", ShardFormat(LEN, "uint16", True, "zstd:3", "xxh3_64", 6000)
    folder = root / "chat" / "train"
    manifest = json.loads((root / "manifest.json").read_bytes())
    entries, eos = [], manifest["tokenizer"]["eos_id"]
    for number, (tokens, masks) in enumerate(read(root, "chat")):
        starts = np.argwhere((tokens[:, :-1] == eos) & masks[:, 1:])
        masks[tuple(starts[0] + (0, 1))] = number > 0
        name = f"shard.{number:05d}.00000"
        entries.append(write_shard(form, folder, name, tokens, masks))
    for file in {*folder.iterdir()} - {folder / entry["zip_data"]["basename"] for entry in entries}:
        file.unlink()
    (folder / "index.json").write_bytes(index_bytes(entries))
    manifest["streams"]["chat"]["train"]["index"] = read_index(str(root), "chat", "").fingerprint
    manifest.pop("sha256", None)
    (root / "manifest.json").write_text(json.dumps(manifest))
    held = manifest["streams"]["chat"]["train"]["documents"]
    with pytest.raises(UserError, match=rf"chat/train: documents: found {held - 1}, the manifest says {held}"):
        verify_shards.verify_shards(root)


def test_a_look_at_a_step_shows_whole_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path)
    config(tmp_path)
    words = [f"shards={tmp_path}/out", f"cache={tmp_path}/cache", f"save_folder={tmp_path}/run", "run_name=x"]
    words += ["train_on=assistant", "model.model_type=llama", f"model.max_position_embeddings={LEN}"]
    assert inspect_batch.main([str(tmp_path / "train.yaml"), "step=1", *words, "--json", "--mask"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    texts = [text for block in blocks for sequence in block["text"] for text in sequence if text.startswith("<s>")]
    assert any("\u27e7[INST]" in text or "⟧[INST]" in text for text in texts)
    assert all(text.endswith("</s>⟧") for text in texts)
