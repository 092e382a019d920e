"""A row that a tokenizer fails on is rejected and the build goes on; a worker that dies for good is named with rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from chimera.cli import UserError
from chimera.convert.build.executor import Event
from chimera.convert.build.part import _Part
from tests.convert import builds
from tests.convert.small_tokenizer import changed

# Of this regex `tokenizers` panics on a run of a's that no b ends: its engine gives up, after a fifth of a second.
PANICS = "a" * 40
SPLIT = {"type": "Split", "pattern": {"Regex": r"(a|a)*b|[\s\S]"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def settings_of(folder: Path, rows: list[Any], **stream: Any) -> dict[str, Any]:
    """A build of one stream of `rows` by the tokenizer that panics."""
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}
    (folder / "tokenizer.json").write_text(json.dumps(changed(pre_tokenizer=pre_tokenizer)))
    (folder / "rows.jsonl").write_bytes(builds.jsonl(rows))
    one = {"min_tokens": 1, "sources": [{"files": [f"{folder}/rows.jsonl"]}], **stream}
    return builds.config(folder, folder / "out", tokenizer={"path": str(folder)}, streams={"one": one})


def test_a_row_that_makes_a_tokenizer_panic_is_rejected_also_in_the_sample(tmp_path: Path) -> None:
    rows = [{"text": text} for text in (PANICS, *builds.texts(1, 3))]
    found = builds.build_here(settings_of(tmp_path, rows, min_chars=0))["streams"]["one"]
    assert found["rows"] == {"read": 4, "documents": 3, "filtered": {}, "rejected": {"encoder_failed": 1}}
    (reject,) = zstandard.decompress((tmp_path / "out/rejects/one.jsonl.zst").read_bytes(), 1 << 20).splitlines()
    assert json.loads(reject) == {
        "file": f"{tmp_path}/rows.jsonl",
        "line": 1,
        "reason": "encoder_failed",
        "raw": PANICS,
    }


def test_batches_of_any_size_reject_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "Chi?", "output": "Il gatto."}] * 66
    rows[65] = {"instruction": "Chi?", "output": PANICS}  # behind the sample
    settings = settings_of(tmp_path, rows, format="chatml", packing="none")
    assert builds.build_here(settings)["streams"]["one"]["rows"]["rejected"] == {"encoder_failed": 1}
    whole = builds.tree(tmp_path / "out")
    monkeypatch.setattr("chimera.convert.build.batches.BATCH_ROWS", 1)
    builds.build_here({**settings, "output": f"{tmp_path}/other"})
    assert builds.tree(tmp_path / "other") == whole


class Crashing(builds.Inline):
    """An executor whose worker dies as it encodes."""

    def wait(self, seconds: float) -> list[Event]:
        task = self._tasks[0]
        with pytest.raises(builds._Stopped):
            super().wait(seconds)
        return [Event("lost", task, "it was ended by SIGSEGV")]


def test_a_worker_that_dies_for_good_is_named_with_file_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise builds._Stopped

    monkeypatch.setattr(_Part, "_add", crash)
    settings = settings_of(tmp_path, [{"text": text} for text in builds.texts(1, 5)])
    with pytest.raises(UserError, match=r"SIGSEGV: it was at line 1 of \S+/rows.jsonl to line 5, or just behind: take"):
        builds.build_here(settings, Crashing)
