"""`python -m pipeline.finetune` from a folder of transformers to scores, and what it says to bad input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.errors import PeerLost, run_command
from pipeline.finetune import __main__ as command

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "good", "bad"]
SST2 = "sentence\tlabel\n" + "".join(f"a {('bad', 'good')[i % 2]} {'cdefgh'[i % 6]}\t{i % 2}\n" for i in range(24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers, and a file in SST-2's format."""
    folder = tmp_path_factory.mktemp("command")
    config = transformers.BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "model")
    (folder / "model" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "train.tsv").write_text(SST2)
    return folder


def options(folder: Path, out: Path, *more: str) -> list[str]:
    files = ["--model", f"{folder}/model", "--train", f"{folder}/train.tsv", "--eval", f"{folder}/train.tsv"]
    small = ["--max-seq-len", "16", "--epochs", "20", "--batch", "8", "--learning-rate", "3e-3", "--threads", "1"]
    return ["sst2", *files, "--out", str(out), *small, *more]


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str]:
    """Exit code and what stands on standard error."""
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


def test_help_is_quick_and_needs_no_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.finetune", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "--doc-stride" in run.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "tokenizers", "safetensors"}


@pytest.mark.slow
def test_from_a_folder_of_transformers_to_scores(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out with a blank"
    arguments = options(folder, out, "--seed", "1", "2", "--dataset", "toy reviews")
    run = subprocess.run([sys.executable, "-m", "pipeline.finetune", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"]["accuracy"] == 100.0
    assert scores["dataset"] == "toy reviews"
    assert [record["seed"] for record in scores["seeds"]] == [1, 2]
    assert run.stdout.splitlines()[-1].startswith(
        "toy reviews: accuracy 100.00 %, f1 100.00 % (seed 1, the best of 2); "
    )
    assert json.loads((out / "predictions.json").read_text())["3"] == "1"
    theirs = transformers.BertForSequenceClassification.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    theirs.eval()
    with torch.no_grad():
        logits = theirs(**tokenizer(["a bad c", "a good d"], return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == [0, 1]


def test_a_share_of_unknown_tokens_is_told_and_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "strange.tsv"
    strange.write_text(SST2.replace("a good", "zz good"))
    monkeypatch.setattr(sys, "argv", ["finetune", *options(folder, tmp_path, "--eval", str(strange), "--epochs", "1")])
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main)
    line = f"{strange}: 12 of 120 tokens (10.0%) are [UNK]"

    assert (stopped.value.code, capfd.readouterr().out.count(f": {line}")) == (0, 1)
    (note,) = json.loads((tmp_path / "scores.json").read_text())["notes"]  # none on the training file
    assert note.startswith(line)


def test_bad_files_end_with_one_line_and_code_3(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_text("text\tlabel\na\t1\n")
    arguments = options(folder, tmp_path / "out", "--eval", str(bad))
    code, said = fails(capsys, monkeypatch, arguments)
    assert (code, said) == (3, f"{bad}:1: column 'sentence' is missing; found 'text', 'label'\n")
    bad.write_text('{"data": [')
    code, said = fails(capsys, monkeypatch, ["squad", *arguments[1:], "--train", str(bad), "--max-query-length", "4"])
    assert (code, said.count("\n")) == (3, 1)
    assert said.startswith(f"{bad}:1: not valid JSON")


def test_bad_values_are_all_named_with_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(folder, tmp_path / "out", "--batch", "0", "--learning-rate", "nan", "--seed", "-1")
    code, said = fails(capsys, monkeypatch, arguments)
    assert code == 2
    assert said.splitlines() == [
        "command line: batch = 0: must be at least 1",
        "command line: learning_rate = nan: expected a finite number",
        "command line: seeds = -1: must be at least 0",
    ]
    assert not (tmp_path / "out").exists()
    code, said = fails(capsys, monkeypatch, options(folder, tmp_path / "out", "--mode", "train,test"))
    assert (code, said) == (2, "sst2: mode 'test' is unknown; choose from train, eval, prediction\n")
    mismatched = options(folder, tmp_path / "out", "--eval-mismatched", f"{folder}/train.tsv")
    code, said = fails(capsys, monkeypatch, mismatched)
    assert (code, said) == (2, "--eval-mismatched belongs to mnli, not sst2\n")
    only_model = ["mrpc", "--model", f"{folder}/model", "--out", str(tmp_path / "out")]
    code, said = fails(capsys, monkeypatch, only_model)
    assert (code, said) == (2, "--mode train,eval needs --train FILE\n")


def test_folders_that_are_no_model_end_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    arguments = options(folder, tmp_path / "out", "--model", str(model))
    code, said = fails(capsys, monkeypatch, arguments)
    assert (code, said.count("\n")) == (4, 1)
    assert "config.json" in said
    for file in (folder / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "vocab.txt").write_text("\n".join([*VOCAB, *(f"x{i}" for i in range(20))]) + "\n")
    code, said = fails(capsys, monkeypatch, arguments)
    assert code == 3
    assert "vocab.txt has 35 tokens and the model beside it 16 rows (padded)" in said
    (model / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    code, said = fails(capsys, monkeypatch, arguments)
    assert (code, "do_lower_case is 'yes', not true or false" in said) == (3, True)


def test_a_rank_that_is_killed_is_named_with_the_code_of_a_lost_peer(tmp_path, monkeypatch) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\n[ $RANK = 0 ] && exec sleep 60\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(PeerLost, match=r"^rank 1 of 2 was killed by signal 9; the same command goes on"):
        command._start_ranks(2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_ranks_stop_with_the_command_that_started_them(folder: Path, tmp_path: Path, number: int, code: int) -> None:
    words = options(folder, tmp_path / "out", "--epochs", "1000", "--processes", "2")
    log = tmp_path / "log"
    with log.open("w") as file:
        started = subprocess.Popen([sys.executable, "-m", "pipeline.finetune", *words], stdout=file, stderr=file)
    try:
        while "loss" not in log.read_text():
            assert started.poll() is None, log.read_text()
            time.sleep(0.1)
        ranks = [int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
        assert len(ranks) == 2
        started.send_signal(number)
        assert started.wait() == code
        assert ("is saved" in log.read_text()) == (code == 75)
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert "predicted" not in log.read_text(), "they went on to the end by themselves"
            time.sleep(0.1)
    finally:
        started.kill()
