"""Fine-tuning on the engine: every task is learnt, accumulation is exact, seeds are compared, results are whole."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from data_prep.errors import DataError
from pipeline.bert.folder import ModelFolder, read_folder
from pipeline.config import FinetuneConfig
from pipeline.engine import loop
from pipeline.engine.precision import LossScale
from pipeline.engine.ranks import Ranks
from pipeline.errors import CheckpointError, ConfigError, EnvironmentFault, NumericalError
from pipeline.finetune.predict import predict
from pipeline.finetune.problems import problem_of
from pipeline.finetune.scores import collect
from pipeline.finetune.task import Finetuning, Spec, finetune, run
from pipeline.node.job import Job, Topology
from pipeline.run.files import read_jsonl
from pipeline.run.rundir import RunDir
from support.toys import NOUNS, config_of, examples, write_model

pytestmark = pytest.mark.slow  # small trainings

ALONE = Ranks(0, 1, None, torch.device("cpu"))


def job(folder: Path, task: str = "mrpc") -> Job:
    """The next attempt at a stage of a run without a recipe; ``folder`` becomes a link to the stage's folder."""
    run = RunDir(folder.with_suffix(".run"))
    stage = run.stage(task)
    if not folder.exists():
        stage.path.mkdir(parents=True)
        folder.symlink_to(stage.path)
    return Job(run, task, stage.new_attempt("test"), Topology(0, 1, 0, "test"), workers=1, threads=1)


def said(job: Job) -> str:
    return job.attempt.log.read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("task", ["squad", "mrpc", "sst2", "cola", "mnli"])
def test_a_random_model_learns_every_task_by_heart(tmp_path: Path, model: Path, task: str) -> None:
    data = examples(tmp_path, task)
    result = run(job(tmp_path / "out", task), task=task, config=config_of(task), model=model, train=data, eval=data)
    assert all(value > 90 for value in result["scores"].values()), result["scores"]
    assert result == read(tmp_path / "out" / "scores.json")
    assert (result["dataset"], result["unit"]) == (f"toy {task}", "percent")
    assert result["examples"] == result["train_examples"] == 32
    predictions = read(tmp_path / "out" / "predictions.json")
    if task == "squad":
        assert predictions["q0"].rstrip("s") in NOUNS
        assert read(tmp_path / "out" / "nbest_predictions.json")["q0"][0]["text"] == predictions["q0"]
    else:
        labels = {"mnli": ["contradiction", "neutral"]}.get(task, ["0", "1"])
        first = 1 if task == "cola" else 2
        assert predictions == {str(first + i): labels[i % 2] for i in range(32)}


@pytest.mark.parametrize(
    ("task", "kind"),
    [("squad", "BertForQuestionAnswering"), ("mnli", "BertForSequenceClassification")],
)
def test_the_result_is_a_model_of_transformers(tmp_path: Path, model: Path, task: str, kind: str) -> None:
    data = examples(tmp_path, task)
    config = config_of(task, epochs=1)
    run(job(tmp_path / "out", task), task=task, config=config, model=model, train=data, eval=data)
    saved = tmp_path / "out" / "model"
    theirs, report = getattr(transformers, kind).from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    folder = ModelFolder(saved)
    problem = problem_of(task, config, folder.tokenizer)
    samples, _ = problem.read_eval(data, labelled=True)
    ours = problem.new_model(folder.config)
    folder.load_into(ours, problem.head, None)
    theirs.eval()
    for i, logits in enumerate(predict(ours, problem, samples, config, ALONE)):
        own = samples.take(np.array([i]))
        segments = (np.arange(len(own.tokens)) >= own.b_start[0]).astype(int)
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor(own.tokens)[None], token_type_ids=torch.tensor(segments)[None])
        expected = torch.stack([out.start_logits[0], out.end_logits[0]], -1) if task == "squad" else out.logits[0]
        np.testing.assert_allclose(logits, expected.numpy(), atol=2e-5)
    if task == "mnli":
        assert theirs.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
        first = data.read_text().splitlines()[1].split("\t")
        ids = tokenizer(first[1], first[2])["input_ids"]
        assert ids == samples.take(np.array([0])).tokens.tolist()


@pytest.fixture(scope="module")
def sober(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without dropout."""
    folder = tmp_path_factory.mktemp("sober")
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = read(model / "config.json") | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def losses(out: Path, model: Path, data: Path, config: FinetuneConfig) -> list[float]:
    """The loss of every step of a training."""
    begun = job(out)
    run(begun, task="mrpc", config=config, model=model, train=data, eval=data)
    lines = [line for line in read_jsonl(begun.attempt.metrics) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_micro_batches_add_up_to_the_same_training(tmp_path: Path, sober: Path) -> None:
    data = examples(tmp_path, "mrpc")
    whole = losses(tmp_path / "whole", sober, data, config_of("mrpc", epochs=3, batch=20, micro_batch=20))
    parts = losses(tmp_path / "parts", sober, data, config_of("mrpc", epochs=3, batch=20, micro_batch=3))
    assert len(whole) == 6  # 20 + 12 samples in each epoch
    np.testing.assert_allclose(parts, whole, rtol=2e-4)
    assert abs(whole[0] - np.log(2)) < 0.2


def test_the_order_of_samples_differs_by_seed_and_by_epoch(tmp_path: Path, sober: Path) -> None:
    data = examples(tmp_path, "mrpc")
    still = config_of("mrpc", epochs=2, batch=8, learning_rate=1e-30)
    seeds = {"first": 1, "again": 1, "other": 2}
    runs = (losses(tmp_path / name, sober, data, replace(still, seeds=(seed,))) for name, seed in seeds.items())
    first, again, other = runs
    assert first == again
    assert first != other
    np.testing.assert_allclose(np.mean(first[:4]), np.mean(first[4:]), rtol=1e-5)
    assert not np.allclose(first[:4], first[4:], rtol=1e-5)


def test_seeds_are_compared_and_the_best_is_published(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "mrpc"), config_of("mrpc", epochs=8)
    folders = [tmp_path / f"mrpc-{seed}" for seed in (3, 1, 2)]
    for folder, seed in zip(folders, (3, 1, 2), strict=True):
        own = replace(config, seeds=(seed,))
        run(job(folder), task="mrpc", config=own, model=model, train=data, eval=data)
    out = tmp_path / "out"
    out.mkdir()
    result = collect(out, folders)
    accuracies = [record["scores"]["accuracy"] for record in result["seeds"]]
    assert [record["seed"] for record in result["seeds"]] == [3, 1, 2]
    assert len(set(accuracies)) > 1
    assert result["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    best = int(np.argmax(accuracies))
    assert (result["best_seed"], result["ranked_by"]) == ((3, 1, 2)[best], "accuracy")
    assert result["scores"]["accuracy"] == max(accuracies)
    assert result == read(out / "scores.json")
    assert read(out / "predictions.json") == read(folders[best] / "predictions.json")
    assert (out / "model").resolve() == (folders[best] / "model").resolve()
    assert [folder for folder in folders if (folder / "model").is_dir()] == [folders[best]]


def test_a_finished_result_is_kept_and_another_configuration_or_file_trains_again(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "mrpc"), config_of("mrpc", epochs=1)

    def again(**changed: Any) -> bool:
        begun = job(tmp_path / "out")
        run(begun, task="mrpc", config=replace(config, **changed), model=model, train=data, eval=data)
        return "finished earlier" not in said(begun)

    assert again()
    assert not again(dataset="other name")
    assert again(learning_rate=1e-3)
    data.write_text(data.read_text().replace("fox", "ant"))
    assert again(learning_rate=1e-3)
    assert not list((tmp_path / "out").glob("attempts/*/step-*"))  # what is finished needs no checkpoint


def test_a_fine_tuned_folder_is_scored_and_predicts_unlabelled_files(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "sst2"), config_of("sst2", epochs=10)
    trained = run(job(tmp_path / "out"), task="sst2", config=config, model=model, train=data, eval=data)

    def only(mode: str, file: Path, source: Path) -> dict[str, Any]:
        spec = Spec(task="sst2", config=config, model=source, train=None, eval=file, modes=(mode,))
        return finetune(job(tmp_path / mode), spec)

    tuned = tmp_path / "out" / "model"
    scored = only("eval", data, tuned)
    assert scored["scores"] == trained["scores"]
    bare = tmp_path / "bare.tsv"
    bare.write_text("".join(line.split("\t")[0] + "\n" for line in data.read_text().splitlines()))
    predicted = only("prediction", bare, tuned)
    assert predicted["scores"] == {}
    assert read(tmp_path / "prediction" / "predictions.json") == read(tmp_path / "out" / "predictions.json")
    with pytest.raises(CheckpointError, match="classifier"):
        only("eval", data, model)


def classifier(folder: Path, model: Path, classes: int, **config: Any) -> Path:
    """A random classifier as transformers saves it, with further entries of its config.json (None: without)."""
    torch.manual_seed(classes)
    transformers.BertForSequenceClassification.from_pretrained(model, num_labels=classes).save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((model / "vocab.txt").read_bytes())
    described = read(folder / "config.json") | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in described.items() if value}))
    return folder


def only_predicted(out: Path, task: str, source: Path, file: Path, mode: str = "prediction") -> dict[str, Any]:
    spec = Spec(task=task, config=config_of(task), model=source, train=None, eval=file, modes=(mode,))
    finetune(job(out, task), spec)
    return read(out / "detailed_predictions.json")


def by_transformers(source: Path, *texts: str) -> dict[str, float]:
    """The chance of every class by its name."""
    tokenizer, net = (
        kind.from_pretrained(source)
        for kind in (transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification)
    )
    with torch.no_grad():
        chances = net.eval()(**tokenizer(*texts, return_tensors="pt")).logits.softmax(1)[0]
    return {net.config.id2label[i]: float(chance) for i, chance in enumerate(chances)}


@pytest.mark.parametrize(
    "order", [("entailment", "neutral", "contradiction"), ("NEUTRAL", "Contradiction", "entailment")]
)
def test_classes_of_a_model_from_elsewhere_go_by_their_names(
    tmp_path: Path, model: Path, order: tuple[str, ...]
) -> None:
    source = classifier(tmp_path / "theirs", model, 3, id2label={str(i): name for i, name in enumerate(order)})
    data = examples(tmp_path, "mnli")
    first = only_predicted(tmp_path / "out", "mnli", source, data)["2"]
    theirs = {name.lower(): chance for name, chance in by_transformers(source, *first["text"]).items()}
    assert first["probabilities"] == pytest.approx(theirs, abs=1e-5)
    assert first["label"] == max(theirs, key=lambda name: theirs[name])


def test_classes_that_the_task_does_not_know_are_told(tmp_path: Path, model: Path) -> None:
    source = classifier(tmp_path / "theirs", model, 2, id2label={"0": "bad", "1": "good"})
    only_predicted(tmp_path / "out", "sst2", source, examples(tmp_path, "sst2"), "eval")
    assert (
        "its classes bad, good are taken for 0, 1, in this order" in read(tmp_path / "out" / "scores.json")["notes"][0]
    )


@pytest.mark.parametrize("named", [{"10": "k", "1": "b", "0": "a"}, None])
def test_classes_go_by_their_numbers_and_not_by_their_place_in_the_file(
    tmp_path: Path, model: Path, named: dict[str, str] | None
) -> None:
    source = classifier(tmp_path / "theirs", model, 12, id2label=named, label2id=None)
    wanted = [(named or {}).get(str(i), f"LABEL_{i}") for i in range(12)]
    assert list(ModelFolder(source).labels) == list(read_folder(source).labels) == wanted


@pytest.mark.parametrize(
    ("classes", "config", "message"),
    [
        (1, {}, "no classifier.* of two or more classes in it"),
        (
            3,
            {"problem_type": "multi_label_classification"},
            "problem_type is 'multi_label_classification', needed is one",
        ),
        (0, {}, "no classifier.* of two or more classes in it"),
    ],
)
def test_what_chooses_no_class_predicts_none(
    tmp_path: Path, model: Path, classes: int, config: dict[str, Any], message: str
) -> None:
    source = classifier(tmp_path / "theirs", model, classes, **config) if classes else model
    with pytest.raises(CheckpointError) as error:
        only_predicted(tmp_path / "out", "sst2", source, examples(tmp_path, "sst2"))
    assert message in str(error.value)


def test_a_model_of_masked_words_is_fine_tuned_with_a_pooler_of_the_seed(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "theirs"
    transformers.BertForMaskedLM.from_pretrained(model).save_pretrained(source)
    (source / "vocab.txt").write_bytes((model / "vocab.txt").read_bytes())
    data, config = examples(tmp_path, "mrpc"), config_of("mrpc", epochs=1)
    results = [
        run(job(tmp_path / out), task="mrpc", config=config, model=source, train=data, eval=data) for out in "ab"
    ]
    assert results[0] == results[1]
    assert "has no pooler: it is drawn anew" in results[0]["notes"][0]
    assert read_folder(tmp_path / "a" / "model").architecture == "BertForSequenceClassification"
    assert read_folder(source).architecture == "BertForMaskedLM"


def test_skipped_answers_are_counted_and_said(tmp_path: Path, model: Path) -> None:
    data = examples(tmp_path, "squad", count=4)
    broken = json.loads(data.read_text())
    broken["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["text"] = "whale"
    data.write_text(json.dumps(broken))
    begun = job(tmp_path / "out", "squad")
    config = config_of("squad", epochs=1)
    result = run(begun, task="squad", config=config, model=model, train=data, eval=data)
    assert (result["train_examples"], result["skipped_train_examples"]) == (3, 1)
    assert (result["examples"], result["eval_features"]) == (4, 4)  # it is asked in the evaluation all the same
    assert "1 examples are left out of training, their answer is not in their" in said(begun)
    assert "context: q1\n" in said(begun)
    assert read(tmp_path / "out" / "skipped_train_examples.json") == ["q1"]
    for paragraph in broken["data"][0]["paragraphs"]:
        paragraph["qas"][0]["answers"][0]["text"] = "whale"
    data.write_text(json.dumps(broken))
    with pytest.raises(DataError, match="no example is left to train on"):
        run(job(tmp_path / "out", "squad"), task="squad", config=config, model=model, train=data, eval=data)


def test_the_published_squad_scores_are_the_official_scripts(tmp_path: Path, model: Path, carriers: Path) -> None:
    data = examples(tmp_path, "squad")
    config = config_of("squad", epochs=6)
    result = run(job(tmp_path / "out", "squad"), task="squad", config=config, model=model, train=data, eval=data)
    assert 0 < result["scores"]["f1"] < 100
    words = [sys.executable, str(carriers / "squad_v1_evaluate.py"), str(data), str(tmp_path / "out/predictions.json")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == pytest.approx(result["scores"], abs=1e-12)


def test_squad_2_learns_which_questions_have_no_answer(tmp_path: Path, model: Path) -> None:
    data = examples(tmp_path, "squad")
    content = json.loads(data.read_text())
    for paragraph in content["data"][0]["paragraphs"][::2]:
        answer = paragraph["qas"][0]["answers"][0]
        paragraph["context"] = paragraph["context"].replace(f"({answer['text']}).", "good")
        paragraph["qas"][0] |= {"answers": [], "is_impossible": True}
    data.write_text(json.dumps(content))
    config = config_of("squad", version_2=True, epochs=40)
    result = run(job(tmp_path / "out", "squad"), task="squad", config=config, model=model, train=data, eval=data)
    answers = list(read(tmp_path / "out" / "predictions.json").values())
    assert result["skipped_train_examples"] == 0
    assert sum(answer == "" for answer in answers[::2]) >= 15
    assert sum(answer == "" for answer in answers[1::2]) <= 1
    assert result["scores"]["f1"] > 90
    n_best = read(tmp_path / "out" / "nbest_predictions.json")
    assert all(any(entry["text"] == "" for entry in entries) for entries in n_best.values())


def test_many_skipped_examples_are_all_named_in_a_file(tmp_path: Path, model: Path) -> None:
    data = examples(tmp_path, "squad", count=8)
    broken = json.loads(data.read_text())
    for paragraph in broken["data"][0]["paragraphs"][1:]:
        paragraph["qas"][0]["answers"][0]["answer_start"] = 10_000
    data.write_text(json.dumps(broken))
    begun = job(tmp_path / "out", "squad")
    run(begun, task="squad", config=config_of("squad", epochs=1), model=model, train=data, eval=data)
    assert "q1, q2, q3, q4, q5 and 2 more, all in skipped_train_examples.json" in said(begun)
    assert read(tmp_path / "out" / "skipped_train_examples.json") == [f"q{i}" for i in range(1, 8)]


def test_mnli_is_scored_on_both_files_apart(tmp_path: Path, model: Path) -> None:
    data = examples(tmp_path, "mnli")
    rows = [line.split("\t") for line in data.read_text().splitlines()]
    swap = {"contradiction": "neutral", "neutral": "contradiction", "gold_label": "gold_label"}
    other = tmp_path / "dev_mismatched.tsv"
    other.write_text("".join("\t".join([*row[:3], swap[row[3]]]) + "\n" for row in rows[:9]))
    spec = Spec(task="mnli", config=config_of("mnli"), model=model, train=data, eval=data, mismatched=other)
    result = finetune(job(tmp_path / "out", "mnli"), spec)
    assert result["scores"] == {"accuracy": 100.0, "accuracy_mismatched": 0.0}  # the same sentences, other labels
    assert (result["examples"], result["examples_mismatched"]) == (32, 8)
    both = [read(tmp_path / "out" / name) for name in ("predictions.json", "mismatched_predictions.json")]
    assert both[1] == {key: both[0][key] for key in both[1]}
    assert len(both[1]) == 8


def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "mrpc"), config_of("mrpc", learning_rate=1e38, warmup=0.0)
    earlier = config_of("mrpc", epochs=1)
    run(job(tmp_path / "out"), task="mrpc", config=earlier, model=model, train=data, eval=data)
    with pytest.raises(NumericalError, match=r"step \d+, rank 0, .*came again.*; lower the learning rate"):
        run(job(tmp_path / "out"), task="mrpc", config=config, model=model, train=data, eval=data)
    assert not (tmp_path / "out" / "scores.json").exists()  # the earlier scores are not this start's


def test_the_loss_is_the_mean_of_start_and_end(model: Path) -> None:
    problem = problem_of("squad", config_of("squad"), ModelFolder(model).tokenizer)
    start = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]))
    end = torch.log(torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]))
    found = float(problem.loss_sum((start, end), torch.tensor([[1, 2], [1, 0]])))
    assert found == pytest.approx((np.log(4) + np.log(2) + np.log(2) + np.log(1)) / 2)


@pytest.mark.parametrize("imitated", [False, True])
def test_bf16_learns_too_and_a_cpu_that_imitates_it_says_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], imitated: bool
) -> None:
    monkeypatch.setattr(loop, "computes_bf16", lambda: not imitated)
    data, config = (
        examples(tmp_path, "sst2"),
        config_of("sst2", precision="bf16", **({"epochs": 1} if imitated else {})),
    )
    result = run(job(tmp_path / "out"), task="sst2", config=config, model=model, train=data, eval=data)
    assert ("this CPU imitates bf16" in capsys.readouterr().out) == imitated
    assert imitated or result["scores"]["accuracy"] > 90


def test_fp16_scales_its_loss_and_skips_what_overflows(
    tmp_path: Path, sober: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = examples(tmp_path, "mrpc")
    lowered: list[float] = []

    def started(scale: float) -> None:
        class Watched(LossScale):
            def __init__(self) -> None:
                super().__init__(scale)

            def lowered(self) -> bool:
                lowered.append(self.scale)
                return super().lowered()

        monkeypatch.setattr(loop, "LossScale", Watched)

    started(2.0**10)
    single = losses(tmp_path / "fp32", sober, data, config_of("mrpc", epochs=3))
    half = losses(tmp_path / "fp16", sober, data, config_of("mrpc", epochs=3, precision="fp16"))
    assert (half != single, lowered) == (True, [])
    np.testing.assert_allclose(half, single, atol=5e-3)
    started(2.0**26)  # the first gradients are beyond fp16
    short = config_of("mrpc", epochs=3, precision="fp16")
    still = losses(tmp_path / "large", sober, data, short)
    assert np.isfinite(still).all()
    assert len(still) == 6  # a batch without an update is no step
    assert lowered[:2] == [2.0**26, 2.0**25]
    monkeypatch.setattr(LossScale, "LOWEST", 2.0**26)
    with pytest.raises(NumericalError, match=r"step 1, .*lowest loss scale"):
        losses(tmp_path / "lowest", sober, data, short)


def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_read(tmp_path: Path, model: Path) -> None:
    missing = tmp_path / "empty.tsv"  # reading it would be a DataError
    missing.touch()
    with pytest.raises(EnvironmentFault, match="tf32 needs a CUDA device"):
        run(
            job(tmp_path / "out"),
            task="mrpc",
            config=config_of("mrpc", precision="tf32"),
            model=model,
            train=missing,
            eval=missing,
        )


@pytest.mark.parametrize(
    ("batch", "capacity", "accumulation"),  # the published recipes on one GPU: MRPC, then SST-2
    [(128, 256, 1), (128, 128, 1), (128, 64, 2), (1024, 256, 4), (1024, 128, 8), (512, 64, 8)],
)
def test_a_batch_is_accumulated_in_as_many_passes_as_the_published_tables_say(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, batch: int, capacity: int, accumulation: int
) -> None:
    passes: list[int] = []
    losses_of = Finetuning.losses

    def counting(self: Finetuning, net: Any, inputs: dict[str, Any]) -> Any:
        passes.append(len(inputs["targets"]))
        return losses_of(self, net, inputs)

    monkeypatch.setattr(Finetuning, "losses", counting)
    data = examples(tmp_path, "mrpc", count=batch)
    config = config_of("mrpc", batch=batch, micro_batch=capacity, epochs=1)
    spec = Spec(task="mrpc", config=config, model=model, train=data, eval=data, modes=("train",), max_steps=1)
    finetune(job(tmp_path / "out"), spec)
    assert passes == [batch // accumulation] * accumulation


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_seq_len": 65}, "mrpc: max_seq_len = 65 exceeds the model's 64 positions"),
        ({"max_seq_len": 70}, "exceeds"),
    ],
)
def test_impossible_configurations_are_refused(
    tmp_path: Path, model: Path, changed: dict[str, Any], message: str
) -> None:
    data = examples(tmp_path, "mrpc")
    with pytest.raises(ConfigError, match=message):
        run(
            job(tmp_path / "out"),
            task="mrpc",
            config=config_of("mrpc", **changed),
            model=model,
            train=data,
            eval=data,
        )


def test_training_never_replaces_its_own_source(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "mrpc"), config_of("mrpc", epochs=1)
    run(job(tmp_path / "out"), task="mrpc", config=config, model=model, train=data, eval=data)
    source = tmp_path / "out" / "model"
    with pytest.raises(ConfigError, match="lies in the output folder"):
        run(job(tmp_path / "out"), task="mrpc", config=config, model=source, train=data, eval=data)
    assert (source / "model.safetensors").exists()
