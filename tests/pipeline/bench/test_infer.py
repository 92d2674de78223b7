"""The inference benchmark: both engines compute the same, take turns, and every row says what was measured."""

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.bench import engines as bench_engines
from pipeline.bench import infer as bench
from pipeline.bench import inputs as bench_inputs
from pipeline.bench.engines import Pipeline, Transformers
from pipeline.bench.infer import interleaved, run
from pipeline.bench.inputs import GLUE, cut_to_one_window, full_samples, invented, workloads
from pipeline.bert.folder import ModelFolder
from pipeline.config import InferenceConfig
from pipeline.errors import CheckpointError, ConfigError, EnvironmentFault, run_command
from pipeline.finetune.options import SQUAD

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.?,", *WORDS]
VOCAB += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
SMALL = InferenceConfig(batches=(1, 3), seconds=0.001, squad_seq_len=48, glue_seq_len=24)


@dataclass
class Lines:
    threads: int = 1
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining model as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A SQuAD file of short and long paragraphs."""
    generator = np.random.default_rng(0)
    paragraphs = []
    for i in range(12):
        sentences = [" ".join(generator.choice(WORDS, generator.integers(4, 12))) + "." for _ in range(1 + i)]
        context = " ".join(sentences)
        answer = {"text": sentences[-1][:3], "answer_start": context.rindex(sentences[-1])}
        paragraphs.append({"context": context, "qas": [{"id": f"q{i}", "question": "bal ber?", "answers": [answer]}]})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def engines(model: Path, task: str, seq_len: int, precision: str = "fp32") -> tuple[Pipeline, Transformers]:
    folder = ModelFolder(model)
    ours = Pipeline(task, folder, seq_len, torch.device("cpu"), precision)
    return ours, Transformers(ours, folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", [SQUAD, GLUE])
@pytest.mark.parametrize("lengths", ["real", "full"])
def test_both_engines_compute_the_same_logits(model: Path, text: Path, task: str, lengths: str) -> None:
    work = {w.task: w for w in workloads(SMALL, text, ModelFolder(model).tokenizer)}[task]
    ours, theirs = engines(model, task, work.seq_len)
    samples = ours.ask(work.pairs) if lengths == "real" else full_samples(5, work.seq_len, len(VOCAB))
    assert (len(set(samples.lengths.tolist())) > 1) == (lengths == "real")
    with torch.inference_mode():
        first, second = ours.forward(ours.inputs(samples)), theirs.forward(theirs.inputs(samples))
    for own, other in zip(first, second, strict=True):
        if task == SQUAD:
            real = torch.arange(own.shape[1]) < torch.from_numpy(samples.lengths)[:, None]
            own, other = own[real], other[real[:, : other.shape[1]]]  # theirs ends with the longest sample
        assert own.std() > 0.01
        torch.testing.assert_close(own, other, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", [SQUAD, GLUE])
def test_both_engines_go_the_whole_way_on_the_same_inputs(model: Path, text: Path, task: str) -> None:
    work = {w.task: w for w in workloads(SMALL, text, ModelFolder(model).tokenizer)}[task]
    ours, theirs = engines(model, task, work.seq_len)
    seen: list[Any] = []
    real = theirs.forward
    theirs.forward = lambda inputs: (seen.append(inputs), real(inputs))[1]  # type: ignore[method-assign]
    with torch.inference_mode():
        first, second = ours.answers(work.pairs), theirs.answers(work.pairs)
    assert len(first) == len(second) == len(work.pairs)
    samples = ours.ask(work.pairs)
    assert seen[0]["input_ids"][seen[0]["attention_mask"].bool()].tolist() == samples.tokens.tolist()
    if task == GLUE:
        assert first == second
        assert set(first) == {"0", "1"}
    else:  # max-context rules and duplicate texts aside, the best span is the same
        assert np.mean([a == b for a, b in zip(first, second, strict=True)]) >= 0.8
        assert all(a in context for a, (_, context) in zip(first, work.pairs, strict=True) if a != "empty")


@pytest.mark.slow
def test_every_row_says_what_was_measured(model: Path, text: Path) -> None:
    job = Lines()
    result = run(job, config=SMALL, model=model, text=text)
    keys = ("task", "batch", "part", "lengths", "engine")
    expected = {
        (task, batch, part, lengths, engine)
        for task in ("squad", "glue")
        for batch in (1, 3)
        for part, lengths in (("forward", "real"), ("end_to_end", "real"), ("forward", "full"))
        for engine in ("pipeline", "transformers")
    }
    assert len(result["rows"]) == len(expected)
    assert {tuple(row[key] for key in keys) for row in result["rows"]} == expected
    for row in result["rows"]:
        assert row["seq_len"] == {"squad": 48, "glue": 24}[row["task"]]
        assert row["precision"] == "fp32"
        assert (row["mean_tokens"] == row["seq_len"]) == (row["lengths"] == "full")
        latency = [row["latency_ms"][p] for p in ("p50", "p90", "p95", "p99")]
        assert 0 < latency[0] <= latency[1] <= latency[2] <= latency[3]
        assert row["rounds"] >= bench.LEAST_ROUNDS
        # between the time of the slowest and of no batch
        assert row["sequences_per_s"] > 1e3 * row["batch"] / (latency[3] * row["rounds"] + 1)
    assert (result["threads"], result["text"]) == (1, "questions.json")
    assert json.loads(json.dumps(result)) == result
    shown = "\n".join(job.lines)
    assert "squad at 48 tokens, fp32" in shown
    assert "glue at 24 tokens, fp32" in shown
    assert len(job.lines) == 1 + 2 + len(expected)
    assert max(map(len, job.lines)) <= 120


def test_engines_take_turns_within_a_measurement() -> None:
    now, calls = [0.0], []

    def call(name: str, took: float) -> Any:
        def timed(number: int) -> None:
            calls.append((name, number))
            now[0] += took

        return timed

    times = interleaved({"a": call("a", 1.0), "b": call("b", 3.0)}, 12.0, 2, clock=lambda: now[0])
    assert calls[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]  # the warm-up, not counted
    assert calls[4:10] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]
    assert times == {"a": [1.0] * 6, "b": [3.0] * 6}  # 6 rounds of 4 seconds reach 2 x 12
    assert len(interleaved({"a": call("a", 100.0)}, 1.0, 2, clock=lambda: now[0])["a"]) == bench.LEAST_ROUNDS


@pytest.mark.parametrize(("took", "warm"), [(1.0, 7), (2.0, 6), (100.0, bench.LEAST_ROUNDS)])
def test_nothing_is_timed_that_was_not_computed_before(took: float, warm: int) -> None:
    now, calls = [0.0], []

    def call(number: int) -> None:
        calls.append(number)
        now[0] += took

    timed = len(interleaved({"a": call}, 12.0, 7, clock=lambda: now[0])["a"])
    assert calls == [*range(warm), *(number % warm for number in range(timed))]
    assert timed == max(bench.LEAST_ROUNDS, 12 // took)


def test_throughput_and_percentiles_are_those_of_the_timed_batches(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [0.001 * (i + 1) for i in range(100)]
    monkeypatch.setattr(bench, "interleaved", lambda timed, seconds, batches: dict.fromkeys(timed, times))
    rows = run(Lines(), config=SMALL, model=model, text=text)["rows"]
    row = next(row for row in rows if row["batch"] == 3)
    assert row["latency_ms"] == pytest.approx({"p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01})
    assert row["sequences_per_s"] == pytest.approx(3 * 100 / sum(times), abs=1e-3)


def test_without_transformers_its_rows_are_left_out_and_one_line_says_so(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_engines, "transformers_is_there", lambda: False)
    job = Lines()
    result = run(job, config=SMALL, model=model, text=text)
    assert {row["engine"] for row in result["rows"]} == {"pipeline"}
    assert [line for line in job.lines if "transformers is not installed" in line] == job.lines[:1]
    quiet = Lines()
    run(quiet, config=replace(SMALL, compare=False), model=model, text=text)
    assert not any("installed" in line for line in quiet.lines)


def test_long_paragraphs_are_cut_to_one_window_at_a_word(model: Path) -> None:
    tokenizer = ModelFolder(model).tokenizer
    context = " ".join(["bal", "xyzzy"] * 30)  # the second word is five pieces
    ((_, cut), (_, kept)) = cut_to_one_window([("bal ber?", context), ("bal?", "ber bal")], 48, tokenizer)
    assert kept == "ber bal"
    assert context.startswith(cut)
    # 48 - 3 question pieces - 3 special tokens leave 42 = 7 x (1 + 5) tokens; the last word may be cut, so it goes
    assert len(cut.split()) == 13
    ours = Pipeline(SQUAD, ModelFolder(model), 48, torch.device("cpu"), "fp32")
    assert len(ours.ask([("bal ber?", cut)])) == 1


def test_invented_texts_are_about_as_long_as_squads(model: Path) -> None:
    squad = invented(ModelFolder(model).tokenizer)
    lengths = [len(context.split()) for context in squad.contexts]
    assert 100 < np.mean(lengths) < 160
    assert np.std(lengths) > 30
    result = run(Lines(), config=replace(SMALL, batches=(2,)), model=model, text=None)
    assert result["text"] == "words of the vocabulary"


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"squad_seq_len": 65}, ConfigError, "inference.squad_seq_len = 65 exceeds the model's 64 positions"),
        ({"precision": "tf32"}, EnvironmentFault, "tf32 needs a CUDA device"),
    ],
)
def test_what_model_or_device_cannot_do_is_refused(
    model: Path, changed: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        run(Lines(), config=replace(SMALL, **changed), model=model, text=None)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_run_and_stay_near(model: Path, text: Path, precision: str) -> None:
    work = workloads(SMALL, text, ModelFolder(model).tokenizer)[0]
    exact, half = (engines(model, SQUAD, 48, p)[0] for p in ("fp32", precision))
    samples = exact.ask(work.pairs)
    with torch.inference_mode():
        wanted, found = (e.forward(e.inputs(samples))[0] for e in (exact, half))
    real = wanted.isfinite()
    assert found.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert 0 < (found[real].float() - wanted[real]).abs().max() < 0.2


def test_a_fine_tuned_folder_is_timed_on_both_tasks(model: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig.from_pretrained(model)
    transformers.BertForQuestionAnswering(config).save_pretrained(tmp_path)  # has no pooler
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    rows = run(Lines(), config=replace(SMALL, batches=(2,), compare=False), model=tmp_path, text=None)["rows"]
    assert {row["task"] for row in rows} == {"squad", "glue"}
    (tmp_path / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(Lines(), config=SMALL, model=tmp_path, text=None)


# ------------------------------------------------------------------------------------------ the command


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: bench.main([*map(str, words)]))
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capsys.readouterr()


def test_the_command_prints_a_table_or_json(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ("--batches", "2", "--seq", "squad=48,glue=24", "--seconds", "0.001", "--threads", "1")
    words = ("--model", model, "--text", text, *small)
    code, out, _ = called(capsys, *words)
    assert code == 0
    lines = [line for line in out.splitlines() if " pipeline " in line]
    assert len(lines) == 6
    assert all(float(line.split()[-1]) > 0 for line in lines)  # the ratio
    code, out, _ = called(
        capsys, *words, "--json", "--alone", "--precision", "fp32,bf16", "--out", tmp_path / "rates.json"
    )
    assert code == 0
    result = json.loads(out)
    assert json.loads((tmp_path / "rates.json").read_text()) == result
    assert [row["precision"] for row in result["rows"]] == ["fp32"] * 6 + ["bf16"] * 6
    assert result["model"]["hidden_size"] == 32
    assert result["environment"]["device"] == result["device"]
    assert (result["environment"]["torch"], result["environment"]["transformers"]) == (torch.__version__, None)
    assert {(row["task"], row["seq_len"], row["batch"]) for row in result["rows"]} == {
        ("squad", 48, 2),
        ("glue", 24, 2),
    }


def test_the_command_refuses_in_one_line_each(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("--batches", "1,x"), "command line: batches = 'x': expected a whole number, found a string\n"),
        (("--batches", "0"), "command line: batches = 0: must be at least 1\n"),
        (("--seq", "squad"), "--seq squad: write it as squad=384,glue=128\n"),
        (("--seq", "glue=x"), "command line: glue_seq_len = 'x': expected a whole number, found a string\n"),
        (("--seconds", "0"), "command line: seconds = 0.0: must be greater than 0\n"),
        (("--precision", "fp32,fp17"), "command line: precision = 'fp17': did you mean 'fp16'?\n"),
        (("--threads", "0"), "--threads 0: must be at least 1\n"),
        (("--model", "/tiny"), "--model /tiny: there is no such file or folder; base and large have random weights\n"),
    ):
        code, _, err = called(capsys, "--model", model, *words)
        assert (code, err) == (2, said)
    code, _, err = called(capsys, "--model", model, "--seq", "squad=48,glue=24", "--text", "none")
    assert (code, err) == (3, "none: cannot be read: No such file or directory\n")


@pytest.mark.slow
def test_a_shape_without_weights_can_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setitem(bench_inputs.SIZES, "base", tiny)
    bench_inputs.write_shape("base", tmp_path)
    folder = ModelFolder(tmp_path)
    assert folder.tokenizer.encoder.vocabulary.size == bench_inputs.VOCAB_SIZE
    rows = run(Lines(), config=replace(SMALL, batches=(2,)), model=tmp_path, text=None)["rows"]
    assert len(rows) == 12


def test_help_is_quick_and_needs_no_torch() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "pipeline.bench", "infer", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--batches" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "tokenizers", "safetensors", "transformers"}
