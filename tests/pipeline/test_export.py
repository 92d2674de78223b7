"""Export: what we trained, transformers loads, with equal logits and equal ids; whole or not at all."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from data_prep.wordpiece import Encoder, Vocabulary
from pipeline import export
from pipeline.bert import folder as bert_folder
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.folder import Source, load_hugging_face, write_folder
from pipeline.bert.heads import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    initialised,
)
from pipeline.bert.packing import pack
from pipeline.bert.tokenizer import Tokenizer
from pipeline.bert.weight_files import load_into
from pipeline.engine import checkpoint
from pipeline.errors import CheckpointError, ConfigError, run_command

SENTENCES = ["Über den Wolken, Café!", "the quick brown fox jumps over [MASK] lazy dogs", "naïve 2024-05-01 日本"]
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]


@dataclass(frozen=True)
class StageJob:
    """What a stage needs of its job."""

    out: Path
    workers: int = 1

    def say(self, line: str) -> None:
        assert line


@pytest.fixture
def vocab(tmp_path):
    """A small vocabulary with every letter in both cases; 3 rows short of a multiple of 8."""
    letters = sorted(set("".join(SENTENCES) + "".join(SENTENCES).lower() + "ucfen") - set(" \n"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [f"[unused{i}]" for i in range((5 - len(tokens)) % 8)]
    assert len(tokens) % 8 == 5
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


@pytest.fixture(params=["erf", "tanh"])
def trained(tmp_path, vocab, request):
    """``(model, checkpoint folder)`` of a model with weights far from their start."""
    size = len(vocab.read_text(encoding="utf-8").splitlines())
    config = BertConfig(
        vocab_size=padded_vocab(size),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_act=request.param,
        initializer_range=0.3,
    )
    model = initialised(BertForPreTraining(config), torch.Generator().manual_seed(0)).eval()
    return model, save_checkpoint(tmp_path / "stages" / "phase2", model)


def save_checkpoint(stage_dir, model, step=100):
    attempt = stage_dir / "attempts" / "0001"
    attempt.mkdir(parents=True, exist_ok=True)
    (attempt / "attempt.json").write_text(json.dumps({"resumed_from": None}))
    return checkpoint.save(
        attempt,
        stage=stage_dir.name,
        attempt=1,
        step=step,
        sample_position=0,
        weights={name: tensor.numpy() for name, tensor in model.state_dict().items()},
        optimizer={"step": np.array(step)},
        identity={},
        model=model.config.to_dict(),
    )


def assert_equals_transformers(folder, model, vocab, lowercase, strip_accents):
    """Same ids for the sentences, same logits for these ids."""
    theirs, report = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not theirs.training
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(vocab, lowercase, strip_accents)
    size = encoder.vocabulary.size
    assert tokenizer.model_max_length == 64
    for sentence in SENTENCES:
        ids = tokenizer(sentence).input_ids
        assert ids[1:-1] == encoder.encode([sentence])[0].tolist()
        assert tokenizer.unk_token_id not in ids[1:-1] or not strip_accents
        batch = pack(ids, [len(ids)], [len(ids)], 64)
        with torch.no_grad():
            mlm, nsp = model(batch, batch.slot)
            expected = theirs(input_ids=torch.tensor([ids]))
        torch.testing.assert_close(mlm[:, :size], expected.prediction_logits[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(nsp, expected.seq_relationship_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("lowercase", "strip_accents"), [(True, True), (True, False), (False, False)])
def test_transformers_loads_the_exported_model(tmp_path, trained, vocab, lowercase, strip_accents):
    model, folder = trained
    job = StageJob(tmp_path)
    facts = export.run(job, checkpoint=folder, vocab=vocab, lowercase=lowercase, strip_accents=strip_accents)
    out = tmp_path / facts["model"]
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert facts["parameters"] == sum(p.numel() for p in model.parameters()) - 3 * 33  # 3 rows, each with a bias
    assert_equals_transformers(out, model, vocab, lowercase, strip_accents)


def test_the_same_bytes_again_and_remains_of_a_killed_try_are_removed(tmp_path, trained, vocab):
    _, folder = trained
    job = StageJob(tmp_path / "export")
    remains = job.out / ".model.abcd.tmp"
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    options = {"checkpoint": folder, "vocab": vocab, "lowercase": True, "strip_accents": True}
    export.run(job, **options)
    first = {name: (job.out / "model" / name).read_bytes() for name in FILES}
    (job.out / "model" / "config.json").write_text("{}")
    export.run(job, **options)
    assert {name: (job.out / "model" / name).read_bytes() for name in FILES} == first
    assert [path.name for path in job.out.iterdir()] == ["model"]


def test_a_failure_leaves_the_older_model_and_nothing_else(tmp_path, trained, vocab, monkeypatch):
    _, folder = trained
    job = StageJob(tmp_path / "export")
    options = {"checkpoint": folder, "vocab": vocab, "lowercase": True, "strip_accents": True}
    export.run(job, **options)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bert_folder, "publish_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.run(job, **options)
    assert [path.name for path in job.out.iterdir()] == ["model"]
    assert sorted(path.name for path in (job.out / "model").iterdir()) == FILES


def test_exporting_an_exported_folder_changes_no_weight(tmp_path, trained, vocab):
    model, folder = trained
    export.run(StageJob(tmp_path), checkpoint=folder, vocab=vocab, lowercase=True, strip_accents=False)
    source = export.read_source(tmp_path / "model")
    tokenizer = Tokenizer(vocab, lowercase=True, strip_accents=False)
    write_folder(tmp_path / "again", source, tokenizer, card="")
    for name in set(FILES) - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    config, state = load_hugging_face(tmp_path / "again")
    assert config == model.config.__class__(**model.config.to_dict() | {"init": "bert"})
    load_into(BertForPreTraining(config), state)


def test_a_stage_folder_means_its_newest_good_checkpoint(tmp_path, trained):
    model, folder = trained
    stage = folder.parents[2]
    newer = save_checkpoint(stage, model, step=200)
    assert export.read_source(stage).origin == "step 200 of phase2"
    weights = newer / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"spoi")
    assert export.read_source(stage).origin == "step 100 of phase2"
    with pytest.raises(CheckpointError, match="SHA-256"):
        export.read_source(newer)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, trained):
    model, _ = trained
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del state["bert.pooler.dense.bias"]
    attempt = tmp_path / "stages" / "other" / "attempts" / "0001"
    attempt.mkdir(parents=True)
    folder = checkpoint.save(
        attempt,
        stage="other",
        attempt=1,
        step=5,
        sample_position=0,
        weights=state,
        optimizer={},
        identity={},
        model=model.config.to_dict(),
    )
    with pytest.raises(CheckpointError, match=r"missing bert\.pooler\.dense\.bias"):
        export.read_source(folder)


def test_another_vocabulary_is_refused(tmp_path, trained, vocab):
    _, folder = trained
    vocab.write_text(
        vocab.read_text(encoding="utf-8") + "".join(f"[unused{i + 100}]\n" for i in range(4)), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="it was trained with another vocabulary"):
        export.run(StageJob(tmp_path), checkpoint=folder, vocab=vocab, lowercase=True, strip_accents=True)
    assert not (tmp_path / "model").exists()


def test_no_source_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="holds no weights: give a checkpoint"):
            export.read_source(path)


def test_the_card_tells_data_and_licences(trained):
    _, folder = trained
    source = export.read_source(folder)
    card = export.model_card(source, data=["Wikipedia 2024-05"], licences=["CC BY-SA 4.0"])
    for words in ("* Wikipedia 2024-05", "* CC BY-SA 4.0", "step 100 of phase2"):
        assert words in card
    assert "Not recorded" not in card
    assert export.model_card(source).count("Not recorded") == 2


# ------------------------------------------------------------------------------------------ NVIDIA's files, both ways

LAYER = (
    *(f"attention.self.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")),
    *(f"attention.output.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")),
    *(f"intermediate.dense_act.{kind}" for kind in ("weight", "bias")),
    *(f"output.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")),
)
HEADS = {
    "BertForPreTraining": (
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        *(
            f"cls.predictions.transform.{part}.{kind}"
            for part in ("dense_act", "LayerNorm")
            for kind in ("weight", "bias")
        ),
        *(f"cls.seq_relationship.{kind}" for kind in ("weight", "bias")),
    ),
    "BertForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
    "BertForSequenceClassification": ("classifier.weight", "classifier.bias"),
}
MODELS = {
    "BertForPreTraining": BertForPreTraining,
    "BertForQuestionAnswering": BertForQuestionAnswering,
    "BertForSequenceClassification": lambda config: BertForSequenceClassification(config, 3),
}


def nvidia_keys(kind, layers):
    """The state dict of NVIDIA's class, key by key."""
    embeddings = [f"{part}_embeddings.weight" for part in ("word", "position", "token_type")]
    embeddings += ["LayerNorm.weight", "LayerNorm.bias"]
    keys = [f"bert.embeddings.{name}" for name in embeddings]
    keys += [f"bert.encoder.layer.{i}.{name}" for i in range(layers) for name in LAYER]
    return sorted([*keys, "bert.pooler.dense_act.weight", "bert.pooler.dense_act.bias", *HEADS[kind]])


@pytest.mark.parametrize(("layers", "entries"), [(12, 207), (24, 399)])
def test_the_key_list_has_as_many_entries_as_nvidias_state_dicts(layers, entries):
    assert len(nvidia_keys("BertForPreTraining", layers)) == entries


@pytest.fixture(params=["erf", "tanh"])
def nvidia_file(tmp_path, vocab, request):
    """``kind -> (model, path)``: weights under NVIDIA's names in a file that shows no GELU, its base.json beside it."""

    def make(kind, shown=None, **extra):
        size = len(vocab.read_text(encoding="utf-8").splitlines())
        config = BertConfig(
            vocab_size=padded_vocab(size),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_act=request.param,
            initializer_range=0.3,
        )
        model = initialised(MODELS[kind](config), torch.Generator().manual_seed(1)).eval()
        state = {
            name.replace("intermediate.dense.", "intermediate.dense_act.")
            .replace("pooler.dense.", "pooler.dense_act.")
            .replace("transform.dense.", "transform.dense_act."): tensor
            for name, tensor in model.state_dict().items()
        }
        if kind == "BertForPreTraining":
            state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        assert sorted(state) == nvidia_keys(kind, 2)
        path = tmp_path / "nvidia" / "pytorch_model.bin"
        path.parent.mkdir()
        torch.save({"model": state, **extra, **(shown or {}).get(request.param, {})}, path)
        values = {name: value for name, value in config.to_dict().items() if name not in ("init", "layer_norm_eps")}
        (path.parent / "bert_config.json").write_text(json.dumps(values | {"hidden_act": "gelu"}))
        return model, path

    return make


@pytest.fixture
def called(capsys, monkeypatch):
    """The command in this process: ``called(*words)`` has returncode, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
        capsys.readouterr()  # what transformers said before
        with pytest.raises(SystemExit) as ended:
            run_command(export.main)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, ended.value.code, out, err)

    return call


def outputs_of(kind, folder, ids, segments):
    theirs, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([segments]))
    return [tensor[0] for tensor in out.to_tuple()]


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_head_goes_from_nvidia_to_transformers_and_back(tmp_path, vocab, nvidia_file, called, kind):
    model, path = nvidia_file(kind)
    act, size = model.config.hidden_act, Vocabulary.load(vocab).size
    done = called(path, "--to", "hf", tmp_path / "hf", "--vocab", vocab, "--gelu", act)
    assert (done.returncode, done.stderr) == (0, "")
    ids, segments = [5, 9, 7, 6], [0, 0, 1, 1]
    batch = pack(ids, [4], [2], 8)
    with torch.no_grad():
        ours = model(batch, batch.slot) if kind == "BertForPreTraining" else model(batch)
    expected = outputs_of(kind, tmp_path / "hf", ids, segments)
    ours = ours if isinstance(ours, tuple) else (ours,)
    if kind == "BertForQuestionAnswering":
        ours = tuple(scores[:, : len(ids)] for scores in ours)  # -inf behind
    if kind == "BertForPreTraining":
        expected[1], ours = expected[1][None], (ours[0][:, :size], ours[1])
    for own, other in zip(ours, expected, strict=True):
        theirs = other.reshape(*own.shape[:-1], -1)  # a score for each of the 4 tokens, or for each class
        torch.testing.assert_close(own[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-4)

    done = called(tmp_path / "hf", "--to", "nvidia", tmp_path / "again.pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("the exact GELU" in done.stdout) == (act == "erf")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    pooler = [name for name in nvidia_keys(kind, 2) if name.startswith("bert.pooler.")]
    left_out = pooler if kind == "BertForQuestionAnswering" else []  # transformers' class has none
    assert sorted(again) == [name for name in nvidia_keys(kind, 2) if name not in left_out]
    first = torch.load(path, weights_only=True)["model"]
    for name, tensor in again.items():
        assert torch.equal(tensor[:size], first[name][:size]), name
        assert tensor.shape == first[name].shape
    base = json.loads((path.parent / "bert_config.json").read_text())
    assert json.loads((tmp_path / "again_config.json").read_text()) == base
    source = export.read_source(tmp_path / "again.pt")
    assert source.config == export.read_source(tmp_path / "hf").config
    assert source.config.hidden_act == act


def test_a_folder_is_made_of_an_nvidia_file_and_made_again(tmp_path, vocab, nvidia_file):
    shown = {"erf": {"master params": []}, "tanh": {"grad_scaler": {}}}
    model, path = nvidia_file("BertForPreTraining", shown)
    for _ in range(2):
        made = export.folder_of_nvidia(path, path.parent / "bert_config.json", vocab, tmp_path / "start")
        assert made == tmp_path / "start"
        ids = [2, 7, 9, 3]
        expected = outputs_of("BertForPreTraining", made, ids, [0, 0, 0, 0])[0]
        batch = pack(ids, [4], [4], 8)
        with torch.no_grad():
            ours = model(batch, batch.slot)[0][:, : len(expected[0])]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_nvidia_and_back_keeps_every_bit_of_a_checkpoint(tmp_path, trained):
    model, folder = trained
    export.write_nvidia_file(tmp_path / "ckpt_100.pt", export.read_source(folder))
    source = export.read_source(tmp_path / "ckpt_100.pt")
    assert source.config == model.config
    assert all(np.array_equal(source.arrays[name], tensor.numpy()) for name, tensor in model.state_dict().items())


def test_what_nvidia_files_do_not_tell_is_asked_for(tmp_path, vocab, nvidia_file, called):
    _, path = nvidia_file("BertForPreTraining", grad_scaler={"scale": 2.0})
    words = (path, tmp_path / "hf", "--vocab", vocab)
    assert called(*words, "--gelu", "erf").stderr == f"{path} was trained with the tanh GELU, not erf\n"
    (path.parent / "bert_config.json").rename(tmp_path / "base.json")
    asked = called(*words)
    assert (asked.returncode, "by --config FILE" in asked.stderr) == (2, True)
    assert called(*words, "--config", tmp_path / "base.json").returncode == 0


def test_weights_of_no_whole_model_are_not_exported(tmp_path, vocab, nvidia_file, called):
    model, path = nvidia_file("BertForSequenceClassification")
    content = torch.load(path, weights_only=True)
    del content["model"]["bert.pooler.dense_act.bias"]
    torch.save(content, path)
    done = called(path, tmp_path / "hf", "--vocab", vocab, "--gelu", "tanh")
    assert done.returncode == 4
    assert done.stderr.endswith("is no whole BertForSequenceClassification: missing bert.pooler.dense.bias\n")
    assert not (tmp_path / "hf").exists()
    config = BertConfig(**model.config.to_dict() | {"layer_norm_eps": 1e-6})
    with pytest.raises(CheckpointError, match=r"layer_norm_eps 1e-06, NVIDIA's code only 1e-12"):
        export.write_nvidia_file(tmp_path / "x.pt", Source(config, {}, "it"))
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="exists already: name a file that does not"):
        export.write_nvidia_file(tmp_path / "x.pt", Source(model.config, {}, "it"))


def test_class_names_go_with_a_classifier_and_a_run_means_its_model(tmp_path, vocab, nvidia_file, called):
    model, _ = nvidia_file("BertForSequenceClassification")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    names = ("contradiction", "entailment", "neutral")
    tokenizer = Tokenizer(vocab, lowercase=True, strip_accents=True)
    write_folder(tmp_path / "run" / "model", Source(model.config, arrays, "it", names), tokenizer, card="")
    assert called(tmp_path / "run", tmp_path / "again").returncode == 0
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert theirs.config.id2label == dict(enumerate(names))


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.export", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_exports_a_trained_folder(tmp_path, carriers):
    """MiniLM through the command: an encoder without heads, under the architecture it has."""
    done = command(carriers / "minilm", "--to", "hf", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "22.7 million parameters" in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    ours, theirs = (transformers.BertModel.from_pretrained(path) for path in (tmp_path / "out", carriers / "minilm"))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    ids = [
        transformers.AutoTokenizer.from_pretrained(p)("Tokenising café").input_ids
        for p in (tmp_path / "out", carriers / "minilm")
    ]
    assert ids[0] == ids[1]

    again = command(carriers / "minilm", tmp_path / "out")
    assert again.returncode == ConfigError.exit_code
    assert again.stderr == f"{tmp_path / 'out'} exists already: name a folder that does not\n"


@pytest.mark.slow
def test_the_command_refuses_in_one_line(tmp_path, trained, vocab):
    _, folder = trained
    missing = command(folder, tmp_path / "out")
    assert missing.returncode == 2
    assert missing.stderr.endswith("name the one it was trained with by --vocab FILE\n")
    spoilt = folder / "weights.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    damaged = command(folder, tmp_path / "out", "--vocab", vocab)
    assert damaged.returncode == 4
    assert len(damaged.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
