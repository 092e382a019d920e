"""Entry point: a byte-level BPE tokenizer with ChatML tokens, trained from the sources of a `shards.yaml`.

Writes `tokenizer.json` at the config's `tokenizer.path`, and beside it the `tokenizer_config.json` that
`transformers` reads EOS, PAD and the chat template from. The same sources give the same tokenizer.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.chatml import CHAT_TEMPLATE, IM_END, IM_START
from chimera.cli import UserError, parse, progress, run, say
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.read.parsing import Dropped
from chimera.files import write_whole
from chimera.limits import Limits
from chimera.stores import is_remote

if TYPE_CHECKING:
    from chimera.convert.read.sources import Opened
    from chimera.convert.settings import BuildSettings, TrainingSettings
    from chimera.convert.stream_settings import StreamSettings


def train(settings: "TrainingSettings") -> Any:
    """The trained `tokenizers.Tokenizer`. Raises `UserError` when a source does not open or has no text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    names = settings.tokenizer
    special = [names.eos_token, names.pad_token, *names.add_tokens, IM_START, IM_END]
    special = [token for token in dict.fromkeys(special) if token is not None]
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
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.train_from_iterator(_texts(settings, Path(scratch)), trainer)
    return tokenizer


def _texts(settings: "TrainingSettings", scratch: Path) -> Iterator[str]:
    """The texts of every stream's documents, up to `chars_per_stream` of each."""
    from chimera.convert.read.sources import open_source

    for name, stream in settings.streams.items():
        if not stream.sources:  # for evaluation alone
            continue
        opened = open_source(name, stream, settings, scratch)
        total, most = 0, min(settings.chars_per_stream, sum(part.bytes for part in opened.parts))
        with progress(most, "char", name) as bar:
            for document in _documents(stream, opened, settings.limits()):
                for text in document.texts:
                    yield (characters := text.decode())
                    total += len(characters)
                    bar.update(len(characters))
                if total >= settings.chars_per_stream:
                    break
        if not total:
            raise UserError(f"streams.{name}: its source holds no usable document to train a tokenizer from")


def _documents(stream: "StreamSettings", opened: "Opened", limits: Limits) -> Iterator[Document]:
    from chimera.convert.read.reading import Position
    from chimera.convert.read.sources import rows

    if stream.format != "text":  # a template may be that of the tokenizer to be trained: the texts are the same
        stream = stream.model_copy(update={"format": "chatml", "turns": "all"})
    reader = DocumentReader(stream, {IM_START: 0, IM_END: 0}, opened.column or "")
    for span in (span for part in opened.parts for span in part.spans):
        for row in rows(span, opened.column, Position(), limits):
            found = None if row.value is None or isinstance(row.value, Dropped) else reader.read(row.value)
            if isinstance(found, Document):
                yield found


def write(tokenizer: Any, settings: "BuildSettings") -> Path:
    """Save the tokenizer where the config looks for it, its `tokenizer.json` last and whole; returns that.

    Raises `UserError` for one that a build would refuse, say where EOS and PAD are the same.
    """
    file = target(settings)
    raw = tokenizer.to_str(pretty=True).encode()
    Encoder(raw, settings.tokenizer.eos_token, settings.tokenizer.pad_token, str(file), engine="tokenizers")
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
    write_whole(file.parent / "tokenizer_config.json", text.encode())
    write_whole(file, raw)
    return file


def target(settings: "BuildSettings") -> Path:
    """The `tokenizer.json` a config means, whether it is there yet or not."""
    if is_remote(settings.tokenizer.path):
        raise UserError(f"tokenizer.path: {settings.tokenizer.path}: a tokenizer is trained to a folder: give one")
    path = Path(settings.tokenizer.path)
    return path if path.suffix == ".json" else path / "tokenizer.json"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description="Train a byte-level BPE tokenizer from the sources of a shards config.",
        epilog="settings of its own: vocab_size=32000 min_frequency=2 chars_per_stream=100000000 overwrite=false",
    )
    _, path, overrides = parse(parser, argv, "yamls/shards.yaml")
    from chimera.config import load_settings
    from chimera.convert.settings import TrainingSettings

    settings = load_settings(TrainingSettings, path, overrides)
    if target(settings).exists() and not settings.overwrite:
        raise UserError(f"{target(settings)} exists: add overwrite=true to replace it (shards made with it go stale)")
    tokenizer = train(settings)
    file = write(tokenizer, settings)
    size = tokenizer.get_vocab_size()
    say(f"{file}: {size} tokens" + (" (the sources yield no more)" if size < settings.vocab_size else ""))
    return 0


def entry() -> None:
    run(main)
