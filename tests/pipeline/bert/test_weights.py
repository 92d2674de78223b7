"""Weights in: every spelling that exists, and a one-line refusal of everything that does not fit."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pipeline.bert.config import BertConfig
from pipeline.bert.folder import load_hugging_face
from pipeline.bert.heads import BertForPreTraining, BertForQuestionAnswering, initialised
from pipeline.bert.packing import pack
from pipeline.bert.weight_files import load_into, read_nvidia, write_nvidia
from pipeline.bert.weights import load_nvidia, load_start
from pipeline.errors import CheckpointError

CONFIG = BertConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)
VOCAB_SIZE = 61
WORDS, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"


def random_state(seed=0):
    """Weights of a model of 61 tokens, as others store them (no padding rows)."""
    model = initialised(BertForPreTraining(CONFIG), torch.Generator().manual_seed(seed))
    state = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    return state | {name: state[name][:VOCAB_SIZE].clone() for name in (WORDS, BIAS)}


def folder_of(tmp_path, state, **config):
    values = CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE) | config
    (tmp_path / "config.json").write_text(json.dumps(values))
    if state is not None:
        save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def message(error):
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_transformers_saves_comes_in(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE)))
    theirs.save_pretrained(tmp_path)
    config, state = load_hugging_face(tmp_path)
    assert config == CONFIG
    ours = BertForPreTraining(config)
    load_into(ours, state)
    for name, tensor in theirs.state_dict().items():
        if name in state:
            assert torch.equal(ours.state_dict()[name][: len(tensor)], tensor)
    assert torch.equal(state[WORDS][VOCAB_SIZE:], state[WORDS][:VOCAB_SIZE].mean(0).expand(3, -1))
    assert state[BIAS].shape == (64,)


def spelled(state, spelling):
    """The same weights as other programs name them."""
    if spelling == "gamma and beta":
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in state.items()
        }
    if spelling == "tied twice":
        return state | {
            "cls.predictions.decoder.weight": state[WORDS].clone(),
            "cls.predictions.decoder.bias": state[BIAS].clone(),
            "bert.embeddings.position_ids": torch.arange(12)[None],
        }
    if spelling == "bias of the decoder only":
        return {name: tensor for name, tensor in state.items() if name != BIAS} | {
            "cls.predictions.decoder.bias": state[BIAS]
        }
    if spelling == "half precision":
        return {name: tensor.half() for name, tensor in state.items()}
    if spelling == "wrapped":
        return {f"module.{name}": tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    "spelling", ["plain", "gamma and beta", "tied twice", "bias of the decoder only", "half precision", "wrapped"]
)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_spelling_gives_the_same_model(tmp_path, spelling, pickled):
    state = random_state()
    written = spelled(state, spelling)
    folder = folder_of(tmp_path, None if pickled else written)
    if pickled:
        torch.save(written, folder / "pytorch_model.bin")
    config, found = load_hugging_face(folder)
    load_into(BertForPreTraining(config), found)
    for name, tensor in state.items():
        expected = tensor.half().float() if spelling == "half precision" else tensor
        assert torch.equal(found[name][: len(tensor)], expected)
        assert found[name].dtype == torch.float32


def test_an_encoder_without_prefix_and_heads_starts_a_task(tmp_path):
    state = {name: tensor for name, tensor in random_state().items() if name.startswith("bert.")}
    bare = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    config, found = load_hugging_face(folder_of(tmp_path, bare))
    model = initialised(BertForQuestionAnswering(config), torch.Generator().manual_seed(0))
    head = model.qa_outputs.weight.clone()
    load_into(model, found, new=("qa_outputs.",))
    assert torch.equal(model.bert.pooler.dense.weight, state["bert.pooler.dense.weight"])
    assert torch.equal(model.qa_outputs.weight, head)


def test_quantised_weights_are_no_weights(tmp_path):
    name = "bert.encoder.layer.0.output.dense.weight"
    state = random_state()
    state[name] = (100 * state[name]).to(torch.int8)
    with pytest.raises(CheckpointError) as error:
        load_hugging_face(folder_of(tmp_path, state))
    assert f"{name} is torch.int8: quantised" in message(error)


def test_a_model_of_one_segment_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_hugging_face(folder_of(tmp_path, random_state(), type_vocab_size=1))
    assert "type_vocab_size is 1, needed are 2" in message(error)


def test_a_misfit_is_listed_whole_and_changes_nothing(tmp_path):
    state = random_state()
    del state["bert.pooler.dense.bias"], state["bert.encoder.layer.0.intermediate.dense.weight"]
    state["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(16)
    state["cls.seq_relationship.weight"] = torch.zeros(3, 16)
    config, found = load_hugging_face(folder_of(tmp_path, state))
    model = initialised(BertForPreTraining(config), torch.Generator().manual_seed(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_into(model, found, origin="the file")
    assert message(error) == (
        "the file does not fit this BertForPreTraining: missing bert.encoder.layer.0.intermediate.dense.weight, "
        "bert.pooler.dense.bias; surplus bert.encoder.layer.2.output.dense.bias; cls.seq_relationship.weight is "
        "[3, 16] instead of [2, 16]"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_heads_are_dropped_and_started_only_when_named(tmp_path):
    config, found = load_hugging_face(folder_of(tmp_path, random_state()))
    model = BertForQuestionAnswering(config)
    with pytest.raises(
        CheckpointError, match=r"missing qa_outputs.bias, qa_outputs.weight; surplus cls.predictions.bias"
    ):
        load_into(model, found)
    with pytest.raises(CheckpointError, match=r"surplus cls.predictions.bias"):
        load_into(model, found, new=("qa_outputs.",))
    load_into(model, found, new=("qa_outputs.",), drop=("cls.",))
    with pytest.raises(CheckpointError, match=r"surplus qa_outputs.weight"):
        load_into(model, found | {"qa_outputs.weight": torch.zeros(2, 16)}, new=("qa_outputs.",), drop=("cls.",))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cls.predictions.decoder.weight": torch.zeros(VOCAB_SIZE, 16)}, "differs from bert.embeddings.word_emb"),
        ({"bert.pooler.dense_act.bias": torch.zeros(16)}, "bert.pooler.dense.bias is there twice"),
        ({"bert.pooler.dense.bias": torch.full((16,), torch.nan)}, "not finite: bert.pooler.dense.bias"),
    ],
)
def test_contradictions_are_refused(tmp_path, change, expected):
    with pytest.raises(CheckpointError) as error:
        load_hugging_face(folder_of(tmp_path, random_state() | change))
    assert expected in message(error)


def broken_folders(tmp_path):
    """``(what, expected words)`` after each way of spoiling a folder."""
    folder = folder_of(tmp_path, random_state())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for bad, words in (
        (whole[:-100], "model.safetensors cannot be read: Error while deserializing"),
        (b"", "model.safetensors cannot be read"),
        (b"\xff" * 1000, "model.safetensors cannot be read"),
    ):
        weights.write_bytes(bad)
        yield words
    weights.unlink()
    yield "neither model.safetensors nor pytorch_model.bin is there"
    (folder / "model.safetensors.index.json").write_text("{}")
    yield "weights in several files: save them as one"
    for bad in (b"", b"PK\x03\x04 cut", whole[:500], b"\x80\x04K\x01."):
        (folder / "pytorch_model.bin").write_bytes(bad)
        yield "pytorch_model.bin cannot be read"
    torch.save([1, 2], folder / "pytorch_model.bin")
    yield "holds no named tensors but list"
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    yield "step is no tensor but int"
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    yield "(UnpicklingError): it is damaged, or holds more than tensors, which could run code"
    for bad, words in (
        ("{", "config.json is no JSON object"),
        ("[]", "a JSON object is needed"),
        ('{"a": 1}', "vocab_size"),
    ):
        (folder / "config.json").write_text(bad)
        yield words
    (folder / "config.json").unlink()
    yield "config.json cannot be read: No such file"


class Trap:
    """Runs code when a careless reader loads it."""

    def __reduce__(self):
        return (pytest.fail, ("code from a weights file was run",))


def test_broken_and_foreign_folders_are_one_line(tmp_path):
    for expected in broken_folders(tmp_path):
        with pytest.raises(CheckpointError) as error:
            load_hugging_face(tmp_path)
        assert expected in message(error)


def nvidia_names(state):
    """The same weights as NVIDIA's programs store them: fused layers, padded vocabulary, tied matrix twice."""
    renamed = {}
    for name, tensor in state.items():
        for part in ("intermediate.dense", "pooler.dense", "transform.dense"):
            name = name.replace(f"{part}.", f"{part}_act.")
        renamed[name] = tensor
    return renamed | {"cls.predictions.decoder.weight": renamed[WORDS]}


@pytest.mark.parametrize(
    ("extra", "said", "act"),
    [
        ({"grad_scaler": {"scale": 65536.0}, "optimizer": {}, "epoch": 1}, None, "tanh"),
        ({"master params": [], "files": [0], "epoch": 1}, None, "erf"),
        ({}, "tanh", "tanh"),
        ({}, "erf", "erf"),
    ],
)
def test_nvidia_checkpoints_of_both_eras_come_in(tmp_path, extra, said, act):
    state = initialised(BertForPreTraining(CONFIG), torch.Generator().manual_seed(0)).state_dict()
    config_file = tmp_path / "base.json"
    values = CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE)
    config_file.write_text(json.dumps({name: value for name, value in values.items() if name != "model_type"}))
    torch.save({"model": nvidia_names(state), **extra}, tmp_path / "ckpt_7038.pt")
    config, found = load_nvidia(tmp_path / "ckpt_7038.pt", config_file, hidden_act=said)
    assert config == replace(CONFIG, hidden_act=act)
    model = BertForPreTraining(config)
    load_into(model, found)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_nvidia_checkpoints_without_a_known_gelu_are_refused(tmp_path):
    folder_of(tmp_path, None)
    torch.save({"model": {}}, tmp_path / "a.pt")
    torch.save({"model": {}, "grad_scaler": {}}, tmp_path / "b.pt")
    torch.save({"model": [], "grad_scaler": {}}, tmp_path / "c.pt")
    for name, act, words in (
        ("a.pt", None, "does not show which GELU"),
        ("b.pt", "erf", "tanh GELU, not erf"),
        ("c.pt", None, "its entry 'model' is list"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_nvidia(tmp_path / name, tmp_path / "config.json", hidden_act=act)
        assert words in message(error)


# ------------------------------------------------------------------------------------------ the start of a phase


def start_file(folder, state=None, *, extra=None, config=None, wrapped=True):
    """A file as NVIDIA's programs of one generation write it, and (with ``config``) its configuration beside it."""
    names = nvidia_names(state or random_state())
    torch.save({"model": names, **(extra or {})} if wrapped else names, folder / "ckpt_7038.pt")
    if config:
        values = CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE)
        del values["model_type"]
        (folder / "bert_config.json").write_text(json.dumps(values | config))
    return folder / "ckpt_7038.pt"


def refusal(path, config=CONFIG, vocab=None):
    with pytest.raises(CheckpointError) as error:
        load_start(path, config, vocab)
    return message(error)


TANH, ERF = {"grad_scaler": {"scale": 1.0}, "optimizer": {}, "epoch": 1}, {"master params": [], "files": [0, []]}


@pytest.mark.parametrize(
    ("extra", "config", "act", "wrapped"),
    [
        (TANH, None, "tanh", True),
        (ERF, None, "erf", True),
        (TANH, {"hidden_act": "gelu"}, "tanh", True),
        ({}, {"hidden_act": "gelu_new"}, "tanh", True),
        ({}, {"vocab_size": 64}, "erf", False),
        ({}, None, "erf", False),
    ],
)
def test_a_phase_starts_from_any_file_of_nvidias(tmp_path, extra, config, act, wrapped):
    state = random_state()
    path = start_file(tmp_path, state, extra=extra, config=config, wrapped=wrapped)
    wanted = replace(CONFIG, hidden_act=act, hidden_dropout_prob=0.3, init="nvidia")  # dropout and init are free
    found = load_start(path, wanted, None)
    load_into(BertForPreTraining(wanted), found)
    assert all(torch.equal(found[name][: len(tensor)], tensor) for name, tensor in state.items())
    assert len(found[WORDS]) == len(found[BIAS]) == 64


def test_a_phase_starts_from_what_transformers_saved(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE)))
    theirs.eval().save_pretrained(tmp_path)
    ours = BertForPreTraining(CONFIG).eval()
    load_into(ours, load_start(tmp_path, CONFIG, None))
    ids = [7, 3, 60, 1, 2]
    batch = pack(ids, [5], [3], 8)
    with torch.no_grad():
        mlm, nsp = ours(batch, batch.slot)
        out = theirs(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([[0, 0, 0, 1, 1]]))
    torch.testing.assert_close(mlm[:, :VOCAB_SIZE], out.prediction_logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(nsp, out.seq_relationship_logits, rtol=0, atol=1e-5)


def test_masked_words_alone_go_on_from_a_model_of_masked_words_alone(tmp_path):
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG.to_hugging_face(vocab_size=VOCAB_SIZE)))
    theirs.eval().save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith('; train.objective = "mlm" needs neither pooler nor NSP head')
    state, again = (load_start(tmp_path, CONFIG, None, pairs=False) for _ in range(2))
    assert all(torch.equal(state[name], again[name]) for name in state)  # every rank begins with the same
    ours = BertForPreTraining(CONFIG).eval()
    load_into(ours, state)
    assert ours.bert.pooler.dense.weight.std() > 0
    ids = [7, 3, 60, 1, 2]
    batch = pack(ids, [5], [3], 8)
    with torch.no_grad():
        mlm, _ = ours(batch, batch.slot)
        out = theirs(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([[0, 0, 0, 1, 1]]))
    torch.testing.assert_close(mlm[:, :VOCAB_SIZE], out.logits[0], rtol=0, atol=1e-5)


def test_half_a_head_is_damage_whatever_is_trained(tmp_path):
    state = random_state()
    del state["bert.pooler.dense.bias"]
    with pytest.raises(CheckpointError, match=r"missing bert\.pooler\.dense\.bias$"):
        load_start(folder_of(tmp_path, state), CONFIG, None, pairs=False)


def test_a_start_of_another_model_names_every_field(tmp_path):
    other = replace(
        CONFIG,
        vocab_size=72,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=8,
        max_position_embeddings=16,
        type_vocab_size=3,
        hidden_act="tanh",
        layer_norm_eps=1e-6,
    )
    every = (
        "vocab_size is 64, the recipe's is 72; hidden_size is 16, the recipe's is 32; num_hidden_layers is 2, the "
        "recipe's is 3; num_attention_heads is 2, the recipe's is 4; intermediate_size is 24, the recipe's is 8; "
        "hidden_act is erf, the recipe's is tanh; max_position_embeddings is 12, the recipe's is 16; "
        "type_vocab_size is 2, the recipe's is 3; layer_norm_eps is 1e-12, the recipe's is 1e-06"
    )
    folder = folder_of(tmp_path, random_state())
    assert refusal(folder, other) == f"{folder} does not fit the recipe's model: {every}"
    path = start_file(tmp_path, extra=ERF)
    (tmp_path / "config.json").unlink()
    shapes = refusal(path, other)  # without a configuration: what the tensors show
    for part in every.split("; "):
        assert (part in shapes) == (not part.startswith(("num_attention_heads", "layer_norm_eps"))), part


def test_a_start_with_missing_and_surplus_keys_names_all(tmp_path):
    state = random_state()
    del state["bert.pooler.dense.bias"], state["cls.seq_relationship.weight"]
    state["bert.extra"] = torch.zeros(1)
    said = refusal(folder_of(tmp_path, state), replace(CONFIG, hidden_act="tanh"))
    assert said.endswith(
        "hidden_act is erf, the recipe's is tanh; missing bert.pooler.dense.bias, cls.seq_relationship.weight; "
        "surplus bert.extra"
    )


def test_a_start_without_pretraining_heads_says_what_to_do(tmp_path, carriers):
    state = {name: tensor for name, tensor in random_state().items() if name.startswith("bert.")}
    assert "an encoder without pretraining heads (no cls.*)" in refusal(folder_of(tmp_path, state))
    config, _ = load_hugging_face(carriers / "minilm")
    said = refusal(carriers / "minilm", config, carriers / "minilm" / "vocab.txt")
    assert said.endswith("for a task, fine-tune it with python -m pipeline.finetune")


def test_a_start_with_another_vocabulary_names_the_first_line(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(56))]
    folder, own = folder_of(tmp_path, random_state()), tmp_path / "own.txt"
    (folder / "vocab.txt").write_text("\r\n".join(tokens) + "\r\n")
    own.write_text("\n".join(tokens) + "\n")
    load_start(folder, CONFIG, own)  # line ends aside, the same
    own.write_text("\n".join([*tokens[:40], "x", *tokens[41:]]) + "\n")
    assert "own.txt in line 41: 'w35', not 'x'; name the vocabulary" in refusal(folder, vocab=own)
    own.write_text("\n".join(tokens[:-2]) + "\n")
    assert "own.txt in line 60: 'w54', not nothing" in refusal(folder, vocab=own)
    load_start(folder, CONFIG, None)


def test_rxnfp_a_published_model_with_both_heads_is_a_start(carriers):
    folder = carriers / "rxnfp"
    config, _ = load_hugging_face(folder)
    state = load_start(folder, config, folder / "vocab.txt")
    load_into(BertForPreTraining(config), state)
    assert len(state[WORDS]) == 592


def test_starts_that_are_not_there_or_ambiguous_are_one_line(tmp_path):
    assert "no such Hugging Face folder or NVIDIA checkpoint" in refusal(tmp_path / "none")
    path = start_file(tmp_path)
    for name in ("a_config.json", "b_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert "holds a_config.json, b_config.json: keep beside ckpt_7038.pt only" in refusal(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert "cannot be read" in refusal(path)


def test_written_for_nvidia_and_read_again_nothing_changes(tmp_path):
    """The keys are those of their state dict; with transformers as the oracle of what a fused name means."""
    state = initialised(BertForPreTraining(CONFIG), torch.Generator().manual_seed(3)).state_dict()
    write_nvidia(tmp_path / "out.pt", state, "tanh")
    model = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    layer = [f"attention.self.{part}" for part in ("query", "key", "value")]
    layer += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense_act"]
    layer += ["output.dense", "output.LayerNorm"]
    keys = [f"bert.embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type")]
    linears = ["bert.embeddings.LayerNorm", "bert.pooler.dense_act", "cls.predictions.transform.dense_act"]
    linears += ["cls.predictions.transform.LayerNorm", "cls.seq_relationship"]
    linears += [f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in layer]
    keys += [f"{part}.{kind}" for part in linears for kind in ("weight", "bias")]
    assert sorted(model) == sorted([*keys, BIAS, "cls.predictions.decoder.weight"])
    assert model["cls.predictions.decoder.weight"].data_ptr() == model[WORDS].data_ptr()  # stored once
    again, act = read_nvidia(tmp_path / "out.pt")
    assert (act, again.keys()) == ("tanh", state.keys())
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
