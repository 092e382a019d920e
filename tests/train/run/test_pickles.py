"""Checkpoints of others: what is known to run code from a pickle is refused before every load."""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chimera.cli import UserError
from chimera.commands import evaluate, export_hf
from chimera.commands.train import main as train
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.run.start import choose_start, fetch_to_node
from chimera.train.settings import TrainSettings
from chimera.train.step.base import check_pretrained
from chimera.train.step.model import build_model
from tests.convert.small_tokenizer import spec
from tests.damaged import make, words
from tests.train.exports import write_base

CANARY = "canary"  # what a gadget makes in the working folder when it runs
COMMAND, CODE = f"touch {CANARY}", f"open({CANARY!r}, 'w')"


class Call:
    """Pickled as a call of `module.name(*arguments)`, by its name alone; or of what another call gives."""

    def __init__(self, module: "str | Call", name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):
    """Writes a `Call` as what it stands for, whatever is or is not importable here."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Call):
            super().save(obj, save_persistent_id)  # type: ignore[misc]
            return
        if isinstance(obj.module, Call):
            self.save(obj.module)
        elif self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.save(obj.arguments)
        self.write(pickle.REDUCE)


def pickled(value: Any, protocol: int = 2) -> bytes:
    Pickler(out := io.BytesIO(), protocol).dump(value)
    return out.getvalue()


def archive(data: bytes, *more: tuple[str, bytes]) -> bytes:
    """An archive as torch writes it, around a pickle."""
    with zipfile.ZipFile(out := io.BytesIO(), "w") as file:
        for name, held in [("x/data.pkl", data), ("x/byteorder", b"little"), ("x/version", b"3\n"), *more]:
            file.writestr(name, held)
    return out.getvalue()


def legacy(data: bytes) -> bytes:
    """A file of torch before 1.6: pickles one after another."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    return b"".join(pickle.dumps(value, 2) for value in head) + data + pickle.dumps([], 2)


def tar(data: bytes) -> bytes:
    """A file of torch before 0.1.10."""
    none, system = pickle.dumps(0, 2), pickle.dumps({"little_endian": True}, 2)
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as file:
        for name, held in {"sys_info": system, "storages": none, "tensors": none, "pickle": data}.items():
            info = tarfile.TarInfo(name)
            info.size = len(held)
            file.addfile(info, io.BytesIO(held))
    return out.getvalue()


class Trap:
    """As a stranger would write it."""

    def __reduce__(self) -> Any:
        return (exec, (CODE,))


SYSTEM = Call("posix", "system", COMMAND)
OS_SYSTEM = Call("builtins", "getattr", Call("importlib", "import_module", "os"), "system")
NESTED = pickled({"state": SYSTEM})
CALLS: dict[str, Any] = {
    "os.system": SYSTEM,
    "eval": Call("builtins", "eval", CODE),
    "subprocess": Call("subprocess", "check_call", COMMAND.split()),
    "timeit": Call("timeit", "timeit", CODE, "pass", Call("builtins", "eval", "__import__('time').time"), 1),
    "a debugger": Call(Call("builtins", "getattr", Call("bdb", "Bdb"), "run"), "", CODE),
    "a profiler": Call("cProfile", "run", CODE),
    "numpy's own": Call("numpy.testing._private.utils", "runstring", CODE, {}),
    "torch's loader": Call("torch.storage", "_load_from_bytes", archive(NESTED)),
    "torch's loader, an old file": Call("torch.storage", "_load_from_bytes", legacy(NESTED)),
    "torch's rebuild": Call("torch._utils", "_rebuild_tensor_v2", SYSTEM, 0, (1,), (1,), False, OrderedDict()),
    "torch's rebuild by a type": Call("torch._tensor", "_rebuild_from_type_v2", OS_SYSTEM, str, (COMMAND,), None),
    "a pickle in a pickle": Call("_pickle", "loads", NESTED),
    "copyreg": Call("copyreg", "_reconstructor", SYSTEM, Call("builtins", "type", 0), None),
    "a name looked up": Call(OS_SYSTEM, "", COMMAND),
    "in an array": np.array([Trap()], dtype=object),
}
INST = b"(S'%s'\nios\nsystem\n." % COMMAND.encode()
GLOBAL = b"cos\nsystem\n(S'%s'\ntR." % COMMAND.encode()
OBJ = b"(cos\nsystem\nV%s\no." % COMMAND.encode()
MEMO = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x94\x8c%c%s\x85R." % (len(COMMAND), COMMAND.encode())
FILES: dict[str, bytes] = {
    **{f"{name}, protocol 2": archive(pickled({"state": call})) for name, call in CALLS.items()},
    **{f"{name}, protocol 4": archive(pickled({"state": call}, 4)) for name, call in CALLS.items()},
    **{f"opcode {name}": archive(data) for name, data in {"i": INST, "c": GLOBAL, "o": OBJ, "memo": MEMO}.items()},
    "exec by Python 2's name": archive(pickled({"state": Call("__builtin__", "exec", CODE)})),
    "an old file": legacy(NESTED),
    "a bare pickle": NESTED,
    "a tar": tar(NESTED),
    "an old file with an archive behind it": legacy(NESTED) + archive(pickle.dumps({"state": {}}, 2)),
    "two pickles": archive(pickle.dumps({"state": {}}, 2), ("y/data.pkl", NESTED)),
    "two pickles of one name": archive(NESTED, ("x/data.pkl", pickle.dumps({"state": {}}, 2))),
}
UNREAD = ("a tar", "two pickles")  # the versions of torch at hand do not run the pickle in these


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_what_runs_code_where_it_is_trusted_is_refused_unrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "gadget.pt"
    file.write_bytes(FILES[name])
    for lazy in (False, True):
        with pytest.raises(UserError, match="not a checkpoint that can be read"):
            read_checkpoint(file, lazy)
    assert not Path(CANARY).exists()
    with suppress(Exception):  # as Composer does: the gadget is one
        torch.load(file, weights_only=False)
    assert Path(CANARY).exists() or name in UNREAD


def test_weights_alone_are_read_from_safetensors_and_never_from_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base", json.loads(spec()), {})
    settings = TrainSettings(model={"pretrained": str(base)})
    whole = build_model(settings, 700, eos_id=0, pad_id=1).state_dict()
    torch.save({"weight": Trap()}, base / "pytorch_model.bin")
    check_pretrained(str(base), base / "tokenizer.json")
    assert all(map(torch.equal, build_model(settings, 700, eos_id=0, pad_id=1).state_dict().values(), whole.values()))
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, .*: give a folder with its weights as"):
        check_pretrained(str(base), base / "tokenizer.json")
    with pytest.raises(UserError):
        build_model(settings, 700, eos_id=0, pad_id=1)
    assert not Path(CANARY).exists()


def test_a_load_path_of_weights_alone_says_where_they_go(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"holds weights alone: start from them with `model.pretrained`"):
            choose_start(TrainSettings(load_path=str(path), save_folder=str(tmp_path / "run")), tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make(folder := tmp_path_factory.mktemp("pickles"))
    return folder


def branch(run: Path, file: Path) -> object:
    return train(words(run, f"save_folder={file.parent}/branch", f"load_path={file}"))


def resume(run: Path, file: Path) -> object:
    shutil.copytree(run / "run", folder := file.parent / "resumed")
    shutil.copy(file, folder / "ep0-ba2-rank0.pt")
    longer = "phases=[{name: all, steps: 3, proportions: {texts: 0.5, chats: 0.5}}]"
    return train(words(run, f"save_folder={folder}", "autoresume=true", longer))


def other_node(_: Path, file: Path) -> object:
    return fetch_to_node(str(file), file.parent)


def evaluation(run: Path, file: Path) -> object:
    return evaluate.main([str(file), *words(run)])


def exported(_: Path, file: Path) -> object:
    return export_hf.main([str(file), str(file.parent / "out")])


@pytest.mark.parametrize("door", [branch, resume, other_node, evaluation, exported])
@pytest.mark.parametrize("place", ["callbacks", "model", "optimizers"])
def test_the_guard_stands_before_every_load(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Callable[[Path, Path], object], place: str
) -> None:
    """A whole checkpoint of ours, in which one value more is a call."""
    monkeypatch.chdir(tmp_path)
    whole = torch.load(run / "run/ep0-ba2-rank0.pt", weights_only=False)
    whole["state"][place] = {**dict(whole["state"][place]), "more": Trap()}
    torch.save(whole, file := tmp_path / "gadget.pt")
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        door(run, file)
    assert not Path(CANARY).exists()
    torch.load(file, weights_only=False)
    assert Path(CANARY).exists()
