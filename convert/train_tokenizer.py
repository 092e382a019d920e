"""Entry point: a byte-level BPE tokenizer with ChatML tokens, trained from the sources of a `shards.yaml`.

Writes `tokenizer.json` at the config's `tokenizer.path`, and beside it the `tokenizer_config.json` that
`transformers` reads EOS, PAD and the chat template from. The same sources give the same tokenizer.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.chatml import CHAT_TEMPLATE, IM_END, IM_START
from chimera.cli import UserError, load_settings, parse, progress, run, say
from convert.documents import Document, DocumentReader, Dropped
from convert.encoding import Encoder
from convert.settings import BuildSettings, StreamSettings, check
from convert.shards import write_file

if TYPE_CHECKING:
    from convert.sources import Opened


@dataclass
class TrainingSettings(BuildSettings):
    """The settings of a build and those of the tokenizer's training."""

    vocab_size: int = 32_000
    min_frequency: int = 2  # of a pair of tokens, to be merged
    chars_per_stream: int = 100_000_000  # read from the head of each stream's source
    overwrite: bool = False


def train(settings: TrainingSettings) -> Any:
    """The trained `tokenizers.Tokenizer`. Raises `UserError` when a source does not open or has no text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [settings.tokenizer.eos_token, settings.tokenizer.pad_token, IM_START, IM_END]
    special = list(dict.fromkeys(special))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if settings.vocab_size < len(alphabet) + len(special):
        least = len(alphabet) + len(special)
        raise UserError(f"vocab_size: {settings.vocab_size} must be at least {least} (the bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(settings), trainer)
    return tokenizer


def _texts(settings: TrainingSettings) -> Iterator[str]:
    """The texts of every stream's documents, up to `chars_per_stream` of each."""
    from convert.sources import open_source

    for name, stream in settings.streams.items():
        opened = open_source(name, stream, settings)
        total, most = 0, min(settings.chars_per_stream, sum(part.bytes for part in opened.parts))
        with progress(most, "char", name) as bar:
            for document in _documents(stream, opened, settings.retries):
                for text in document.texts:
                    yield (characters := text.decode())
                    total += len(characters)
                    bar.update(len(characters))
                if total >= settings.chars_per_stream:
                    break
        if not total:
            raise UserError(f"streams.{name}: its source holds no usable document to train a tokenizer from")


def _documents(stream: StreamSettings, opened: "Opened", retries: int) -> Iterator[Document]:
    from convert.reading import Position
    from convert.sources import rows

    reader = DocumentReader(stream, {IM_START: 0, IM_END: 0}, opened.column or "")
    for span in (span for part in opened.parts for span in part.spans):
        for row in rows(span, opened.column, Position(), retries):
            found = None if row.value is None or isinstance(row.value, Dropped) else reader.read(row.value)
            if isinstance(found, Document):
                yield found


def write(tokenizer: Any, settings: BuildSettings) -> Path:
    """Save the tokenizer where the config looks for it, its `tokenizer.json` last and whole; returns that.

    Raises `UserError` for one that a build would refuse, say where EOS and PAD are the same.
    """
    file = target(settings)
    raw = tokenizer.to_str(pretty=True).encode()
    Encoder(raw, settings.tokenizer.eos_token, settings.tokenizer.pad_token, str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": settings.tokenizer.eos_token,
        "pad_token": settings.tokenizer.pad_token,
        "additional_special_tokens": [IM_START, IM_END],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_file(file.parent / "tokenizer_config.json", text.encode())
    write_file(file, raw)
    return file


def target(settings: BuildSettings) -> Path:
    """The `tokenizer.json` a config means, whether it is there yet or not."""
    path = Path(settings.tokenizer.path)
    return path if path.suffix == ".json" else path / "tokenizer.json"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description="Train a byte-level BPE tokenizer from the sources of a shards config.",
        epilog="settings of its own: vocab_size=32000 min_frequency=2 chars_per_stream=100000000 overwrite=false",
    )
    _, path, overrides = parse(parser, argv, "yamls/shards.yaml")
    settings = load_settings(TrainingSettings, path, overrides)
    check(settings)
    for key, least, most in (
        ("vocab_size", 1, 1 << 24),
        ("min_frequency", 0, 1 << 60),
        ("chars_per_stream", 1, 1 << 60),
    ):
        if not least <= getattr(settings, key) <= most:
            raise UserError(f"{key}: {getattr(settings, key)} must be from {least} to {most}")
    if target(settings).exists() and not settings.overwrite:
        raise UserError(f"{target(settings)} exists: add overwrite=true to replace it (shards made with it go stale)")
    tokenizer = train(settings)
    file = write(tokenizer, settings)
    size = tokenizer.get_vocab_size()
    say(f"{file}: {size} tokens" + (" (the sources yield no more)" if size < settings.vocab_size else ""))
    return 0


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
