"""Weights and checkpoints made to run code when they are read: each is refused with code 4, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.bert.config import BertConfig
from pipeline.bert.folder import load_hugging_face
from pipeline.bert.heads import BertForPreTraining
from pipeline.bert.weights import load_nvidia
from pipeline.engine.checkpoint_folder import read
from pipeline.errors import CheckpointError
from pipeline.export import read_source
from support.running import call, one_line

pytestmark = [pytest.mark.slow]


class Evil:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path, how: str = "system") -> None:
        self.marker, self.how = marker, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "eval":
            return eval, (f"open({str(self.marker)!r}, 'w').close()",)
        if self.how == "state":
            return dict, (), None, None, iter([("a", Evil(self.marker))])
        return os.system, (f"touch '{self.marker}'",)


def raw(value: Any, protocol: int) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def torch_file(value: Any, *, zipped: bool) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zip_with(name: str, data: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr(f"archive/{name}", b"3\n")
    return buffer.getvalue()


def object_array(marker: Path) -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def text_global(marker: Path) -> bytes:
    return f"cos\nsystem\n(S\"touch '{marker}'\"\ntR.".encode()


def stack_global(marker: Path) -> bytes:
    def text(words: str) -> bytes:
        return b"\x8c" + struct.pack("B", len(words)) + words.encode()

    line = f"touch '{marker}'".encode()
    return b"\x80\x04" + text("os") + text("system") + b"\x93X" + struct.pack("<I", len(line)) + line + b"\x85R."


PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{f"os.system, protocol {p}": lambda marker, p=p: raw(Evil(marker), p) for p in range(6)},  # type: ignore[misc]
    "eval": lambda marker: raw(Evil(marker, "eval"), 2),
    "deep inside": lambda marker: raw({"model": {"a": [torch.ones(1), {"b": (Evil(marker),)}]}}, 2),
    "in the items of a dict": lambda marker: raw(Evil(marker, "state"), 2),
    "torch.save": lambda marker: torch_file({"bert.a": torch.ones(2), "b": Evil(marker)}, zipped=True),
    "torch.save, legacy": lambda marker: torch_file({"model": Evil(marker)}, zipped=False),
    "GLOBAL": text_global,
    "STACK_GLOBAL": stack_global,
    "GLOBAL in a zip": lambda marker: zip_with("version", text_global(marker)),
    "a script archive": lambda marker: zip_with("constants.pkl", text_global(marker)),
    "numpy object array": object_array,
}


def checkpoint_of(run: Path, to: Path) -> Path:
    """A copy of a good checkpoint."""
    shutil.copytree(sorted((run / "stages" / "phase1").glob("attempts/*/step-*"))[-1], to)
    return to


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as transformers writes it, without its weights."""
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    described = config.to_hugging_face(vocab_size=16, pad_token_id=0)
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForPreTraining"], **described}))
    torch.save(BertForPreTraining(config).state_dict(), folder / "good.bin")
    return folder


@pytest.mark.parametrize("kind", PICKLES)
def test_a_malicious_pickle_is_refused_and_runs_nothing(kind: str, model_folder: Path, tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "model"
    shutil.copytree(model_folder, folder)
    data = PICKLES[kind](marker)
    entrances: dict[str, Callable[[], Any]] = {
        "pytorch_model.bin": lambda: load_hugging_face(folder),
        "ckpt_1.pt": lambda: load_nvidia(folder / "ckpt_1.pt", folder / "config.json", hidden_act="erf"),
        "model.safetensors": lambda: read_source(folder),
    }
    for name, enter in entrances.items():
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            enter()
        assert caught.value.exit_code == 4
        assert name in str(caught.value)
        assert not marker.exists(), "code of the file was run"
    if "zip" not in kind and "archive" not in kind and kind not in ("torch.save", "numpy object array"):
        stream = BytesIO(data)
        while not marker.exists():  # a legacy file is several pickles; plain pickle runs what we refused
            pickle.load(stream)


def test_the_same_model_unspoilt_is_read(model_folder: Path, tmp_path: Path) -> None:
    """What is refused above is refused for the pickle, not for something else in the folder."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "good.bin").rename(tmp_path / "model" / "pytorch_model.bin")
    config, state = load_hugging_face(tmp_path / "model")
    assert config.hidden_size == 8
    assert "cls.seq_relationship.weight" in state


@pytest.mark.parametrize("entrance", ["export", "finetune"])
def test_whole_commands_refuse_a_malicious_model(entrance: str, model_folder: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(model_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(PICKLES["torch.save"](marker))
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    (folder / "tokenizer_config.json").write_text("{}")
    (tmp_path / "t.tsv").write_text("sentence\tlabel\na\t1\na a\t0\n")
    words = {
        "export": ["export", folder, tmp_path / "out"],
        "finetune": [
            *("finetune", "sst2", "--model", folder, "--train", tmp_path / "t.tsv", "--eval", tmp_path / "t.tsv"),
            *("--out", tmp_path / "out", "--max-seq-len", 16),
        ],
    }[entrance]
    one_line(call(*words), 4, "pytorch_model.bin", "could run code")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_refused(small_run: Path, tmp_path: Path, name: str) -> None:
    folder, marker = checkpoint_of(small_run, tmp_path / "step-00000024"), tmp_path / "executed"
    assert read(folder).step == 24
    for kind, make in PICKLES.items():
        (folder / name).write_bytes(make(marker))
        with pytest.raises(CheckpointError):
            read(folder)
        assert not marker.exists(), kind
