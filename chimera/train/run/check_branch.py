"""Whether training would begin the branch that a config asks for, told by plan.py and inspect_batch.py in its words."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from chimera.train.data.index import StreamIndex
from chimera.train.data.shards import Shards
from chimera.train.data.state import check_model, resume_step
from chimera.train.order.schedule import Plan
from chimera.train.run.callbacks import meaning
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.run.start import find_start, on_this_node
from chimera.train.settings import TrainSettings
from chimera.train.step.configuration import configuration
from chimera.train.step.optimizer import settle_decay


def check_branch(
    settings: TrainSettings, plan: Plan, indexes: Mapping[str, StreamIndex] | None, shards: Shards | None
) -> None:
    """Raise `UserError` where the checkpoint is not there, or where `plan` has not its history, or not its model.

    Without shards it is only looked for. One in a store is fetched, and removed again. What a model folder
    (`model.pretrained`) becomes is compared by training alone.
    """
    with tempfile.TemporaryDirectory(prefix="chimera-branch-") as folder:
        start = find_start(settings, Path(folder))
        if start.path is None or indexes is None or shards is None:
            return
        state = read_checkpoint(on_this_node(start.path, Path(folder)), lazy=True)
        fingerprints = {name: index.fingerprint for name, index in indexes.items()}
        step = resume_step(state["dataset_state"]["train"], plan, settings.seed, fingerprints)
        about, tokenizer = state["callbacks"]["About"]["about"], shards.tokenizer
        if settings.model and "pretrained" not in settings.model:
            config = configuration(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
            check_model(about, meaning(config, shards, settings), step, start.own)
        settle_decay(settings.optimizer, about.get("optimizer", {}), step)
