"""The packed model against transformers: values, gradients, counts; and that packing changes nothing."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.bert import attention
from pipeline.bert.config import BertConfig
from pipeline.bert.encoder import Bert
from pipeline.bert.folder import load_hugging_face
from pipeline.bert.heads import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    correct,
    initialised,
    pretraining_loss_sums,
)
from pipeline.bert.packing import END_TO_END, PADDED, ROWS, STREAM, pack
from pipeline.bert.weight_files import load_into

CONFIG = BertConfig(
    vocab_size=96,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=64,
)
SEQ_LEN = 40
REACTION = (
    "Nc1cccc2cnccc12.O=C(O)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1>>"
    "O=C(Nc1cccc2cnccc12)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1"
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Samples:
    """A micro-batch of random samples with masked positions and labels."""

    def __init__(self, lengths, vocab_size, seed=0):
        source = np.random.default_rng(seed)
        self.lengths = np.array(lengths)
        self.tokens = source.integers(5, vocab_size, self.lengths.sum())
        self.b_start = source.integers(1, self.lengths + 1)
        self.masked = np.sort(source.choice(self.tokens.size, max(1, self.tokens.size // 7), replace=False))
        self.labels = torch.from_numpy(source.integers(0, vocab_size, self.masked.size))
        self.nsp = torch.from_numpy(source.integers(0, 2, self.lengths.size))

    def batch(self, arranged=ROWS, seq_len=SEQ_LEN):
        return pack(self.tokens, self.lengths, self.b_start, seq_len, arranged)

    def loss(self, model, arranged=ROWS):
        batch = self.batch(arranged)
        logits = model(batch, batch.slot[torch.from_numpy(self.masked)])
        mlm, nsp = pretraining_loss_sums(logits[0], self.labels, logits[1], self.nsp)
        return mlm / len(self.labels) + nsp / len(self.nsp)

    def for_transformers(self):
        batch = self.batch(PADDED)
        mask = torch.arange(batch.tokens.shape[1]) < batch.length[:, None]
        return {"input_ids": batch.tokens, "token_type_ids": batch.segments, "attention_mask": mask.long()}


SAMPLES = Samples([40, 7, 33, 12, 1, 26, 19], CONFIG.vocab_size)


def theirs_of(kind, model, **options):
    """A model of transformers with the same weights."""
    values = model.config.to_hugging_face(vocab_size=model.config.vocab_size)
    other = kind(transformers.BertConfig(**values, **options, attn_implementation="eager"))
    missing, surplus = other.load_state_dict(model.state_dict(), strict=False)
    assert all(name.startswith("cls.predictions.decoder.") for name in missing)
    assert all(name.startswith("bert.pooler.") for name in surplus)
    return other


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(ours, theirs, tolerance):
    assert ours.keys() <= theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-2)  # a key's bias has none
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("path", ["rows", "samples"])
@pytest.mark.parametrize("act", ["erf", "tanh"])
def test_loss_and_gradients_equal_those_of_transformers(monkeypatch, path, act):
    monkeypatch.setattr(attention, "attention_path", lambda device, width: path)
    ours = initialised(BertForPreTraining(replace(CONFIG, hidden_act=act, initializer_range=0.1)), generator())
    theirs = theirs_of(transformers.BertForPreTraining, ours)
    ours.eval(), theirs.eval()
    labels = torch.full(SAMPLES.tokens.shape, -100)
    labels[SAMPLES.masked] = SAMPLES.labels
    padded = SAMPLES.batch(PADDED)
    laid = torch.full((padded.tokens.numel(),), -100)
    laid[padded.slot] = labels
    their_loss = theirs(
        **SAMPLES.for_transformers(), labels=laid.view(padded.tokens.shape), next_sentence_label=SAMPLES.nsp
    ).loss
    loss = SAMPLES.loss(ours)
    assert abs(loss.item() - their_loss.item()) < 1e-5
    assert_equal_gradients(gradients(ours, loss), gradients(theirs, their_loss), 1e-5)


@pytest.mark.parametrize("path", ["rows", "samples"])
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=12))
def test_all_layouts_give_equal_loss_and_gradients(monkeypatch, path, lengths):
    monkeypatch.setattr(attention, "attention_path", lambda device, width: path)
    model = initialised(BertForPreTraining(replace(CONFIG, initializer_range=0.1)), generator()).eval()
    samples = Samples(lengths, CONFIG.vocab_size)
    padded = samples.loss(model, PADDED)
    wanted = gradients(model, padded)
    for arranged in (ROWS, END_TO_END, STREAM):
        loss = samples.loss(model, arranged)
        assert abs(loss.item() / padded.item() - 1) < 1e-5
        assert_equal_gradients(gradients(model, loss), wanted, 1e-5)


def test_a_sample_does_not_see_its_neighbours():
    model = initialised(BertForPreTraining(CONFIG), generator()).eval()
    other = Samples(SAMPLES.lengths, CONFIG.vocab_size)
    other.tokens[: SAMPLES.lengths[0]] = 5  # only the first sample differs
    with torch.no_grad():
        before, after = (each.batch() for each in (SAMPLES, other))
        same = (model.bert(before) == model.bert(after)).all(-1)[before.slot]
    assert not same[: SAMPLES.lengths[0]].any()
    assert same[SAMPLES.lengths[0] :].all()


def test_question_answering_equals_transformers():
    ours = initialised(BertForQuestionAnswering(replace(CONFIG, initializer_range=0.1)), generator()).eval()
    theirs = theirs_of(transformers.BertForQuestionAnswering, ours).eval()
    with torch.no_grad():
        logits, expected = ours(SAMPLES.batch()), theirs(**SAMPLES.for_transformers())
    for found, wanted in zip(logits, (expected.start_logits, expected.end_logits), strict=True):
        for number, length in enumerate(SAMPLES.lengths):
            torch.testing.assert_close(found[number, :length], wanted[number, :length], rtol=0, atol=1e-5)
            assert found[number, length:].isneginf().all()
    start = torch.zeros(len(SAMPLES.lengths), dtype=torch.long)
    assert functional.cross_entropy(ours(SAMPLES.batch())[0], start).isfinite()


def test_classification_equals_transformers():
    model = BertForSequenceClassification(replace(CONFIG, initializer_range=0.1), num_labels=3)
    ours = initialised(model, generator()).eval()
    theirs = theirs_of(transformers.BertForSequenceClassification, ours, num_labels=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(SAMPLES.batch()), theirs(**SAMPLES.for_transformers()).logits, rtol=0, atol=1e-5
        )


def test_a_trained_checkpoint_recovers_masked_tokens_as_published(carriers):
    """rxnfp, the one trained checkpoint with both heads: 98 of 103 tokens of a reaction, each masked in turn."""
    folder = carriers / "rxnfp"
    config, state = load_hugging_face(folder)
    ours = BertForPreTraining(config).eval()
    load_into(ours, state)
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(**config.to_hugging_face(vocab_size=591), attn_implementation="eager")
    ).eval()
    trained = torch.load(folder / "pytorch_model.bin", weights_only=True)
    theirs.load_state_dict(trained | {"cls.predictions.decoder.bias": trained["cls.predictions.bias"]})

    ids = {token: number for number, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
    atoms = re.findall(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.", REACTION)
    sample = torch.tensor([ids["[CLS]"], *(ids[atom] for atom in atoms), ids["[SEP]"]])
    count, length = len(atoms), len(sample)
    places = torch.arange(count)
    tokens = sample.repeat(count, 1)
    tokens[places, places + 1] = ids["[MASK]"]
    batch = pack(tokens.flatten(), [length] * count, [length] * count, 512)
    with torch.no_grad():
        mlm, nsp = ours(batch, batch.slot[places * length + places + 1])
        wanted = theirs(input_ids=tokens[::8])
    assert (count, int((mlm.argmax(-1) == sample[1:-1]).sum())) == (103, 98)
    their_mlm = wanted.prediction_logits[torch.arange(len(places[::8])), places[::8] + 1]
    torch.testing.assert_close(mlm[::8, :591], their_mlm, rtol=0, atol=1e-4)
    torch.testing.assert_close(nsp[::8], wanted.seq_relationship_logits, rtol=0, atol=1e-4)


def test_a_trained_english_encoder_equals_transformers(carriers):
    folder = carriers / "minilm"
    config, state = load_hugging_face(folder)
    ours = initialised(BertForSequenceClassification(config, 2), generator()).eval()
    load_into(ours, state, new=("classifier.",))
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    pairs = [
        ("The cat sat on the mat.", "It was asleep."),
        ("Stock markets fell sharply on Monday.", "Investors sold shares."),
        ("Colourless green ideas sleep furiously, wrote Chomsky in 1957.", "Nobody agrees."),
    ]
    encoded = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    real = encoded.attention_mask.bool()
    lengths = real.sum(1)
    b_start = lengths - (encoded.token_type_ids * real).sum(1)
    batch = pack(encoded.input_ids[real], lengths, b_start, 64)
    with torch.no_grad():
        hidden = ours.bert(batch)
        wanted = theirs(**encoded)
        pooled = ours.bert.pooled(hidden, batch)
    torch.testing.assert_close(hidden[batch.slot], wanted.last_hidden_state[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled, wanted.pooler_output, rtol=0, atol=1e-4)


BASE = BertConfig(vocab_size=30528)
LARGE = replace(BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


@pytest.mark.parametrize(
    ("config", "encoder", "pretraining", "answering", "tensors"),
    [
        (BASE, 109_486_848, 110_111_042, 109_488_386, 206),
        (LARGE, 335_148_032, 336_232_258, 335_150_082, 398),
    ],
    ids=["base", "large"],
)
def test_parameter_counts_are_the_published_ones(config, encoder, pretraining, answering, tensors):
    with torch.device("meta"):
        model, answers = BertForPreTraining(config), BertForQuestionAnswering(config)
    counted = [sum(p.numel() for p in each.parameters()) for each in (model.bert, model, answers)]
    assert counted == [encoder, pretraining, answering]
    assert len(list(model.parameters())) == len(model.state_dict()) == tensors


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    model = initialised(BertForPreTraining(CONFIG), generator())

    def loss(seed):
        torch.manual_seed(seed)
        return SAMPLES.loss(model).item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("path", ["rows", "samples"])
@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_acts_in_training(monkeypatch, path, place):
    monkeypatch.setattr(attention, "attention_path", lambda device, width: path)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = initialised(BertForPreTraining(replace(CONFIG, **none | {place: 0.1}, initializer_range=0.1)), generator())
    assert SAMPLES.loss(model).item() != SAMPLES.loss(model).item()
    without = initialised(BertForPreTraining(replace(CONFIG, **none)), generator())
    assert SAMPLES.loss(without).item() == SAMPLES.loss(without).item()


def test_a_classifier_drops_from_the_pooled_vector():
    config = replace(CONFIG, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    model = initialised(BertForSequenceClassification(config, num_labels=2), generator())
    dropped = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: dropped.append((inputs[0] == 0).float().mean()))
    model(SAMPLES.batch())
    assert 0.3 < dropped[0] < 0.7


def test_initial_weights_follow_the_generator_alone():
    def weights(seed, config=CONFIG):
        return initialised(BertForPreTraining(config), generator(seed)).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["cls.seq_relationship.weight"], other["cls.seq_relationship.weight"])


@pytest.mark.parametrize("init", ["bert", "nvidia"])
def test_initial_weights_have_the_stated_distribution(init):
    config = replace(CONFIG, hidden_size=256, intermediate_size=512, num_hidden_layers=1, init=init)
    state = initialised(BertForPreTraining(config), generator()).state_dict()
    fused = ("intermediate.dense", "pooler.dense", "transform.dense")
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if "LayerNorm" in name:
            assert (tensor == (1 if kind == "weight" else 0)).all()
        elif init == "nvidia" and module.endswith(fused):
            assert abs(tensor.std().item() / (1 / np.sqrt(3 * 256)) - 1) < 0.15
            assert tensor.abs().max() <= 1 / 16
        elif kind == "bias":
            assert (tensor == 0).all()
        else:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.1
            assert abs(tensor.mean().item()) < 0.003


def test_bf16_autocast_stays_near_fp32_on_every_path(monkeypatch):
    model = initialised(BertForPreTraining(replace(CONFIG, initializer_range=0.1)), generator()).eval()
    exact = SAMPLES.loss(model)
    wanted = gradients(model, exact)
    for path in ("rows", "samples"):
        monkeypatch.setattr(attention, "attention_path", lambda device, width, path=path: path)
        with torch.autocast("cpu", torch.bfloat16):
            loss = SAMPLES.loss(model)
        assert loss.dtype == torch.float32
        assert abs(loss.item() - exact.item()) < 0.02
        assert_equal_gradients(gradients(model, loss), wanted, 0.1)


def test_the_attention_path_depends_on_device_and_row_length_only():
    assert [attention.attention_path("cpu", width) for width in (64, 128, 192, 200, 384, 512)] == [
        *["rows"] * 3,
        *["samples"] * 3,
    ]
    assert attention.attention_path("cuda", 128) == "varlen"


def test_loss_sums_and_counts():
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 1.0]]).bfloat16()
    pairs = torch.tensor([[1.0, 0], [1.0, 0]]).bfloat16()
    labels = torch.tensor([0, 1])
    mlm, nsp = pretraining_loss_sums(logits, labels, pairs, labels)
    e = np.e
    assert mlm.dtype == torch.float32
    assert mlm.item() == pytest.approx(-np.log(e**2 / (e**2 + 2)) - np.log(1 / (2 + e)))
    assert nsp.item() == pytest.approx(-np.log(e / (e + 1)) - np.log(1 / (e + 1)))
    assert (correct(logits, labels).sum().item(), correct(pairs, labels).sum().item()) == (1, 1)


def test_hidden_states_of_an_encoder_alone():
    batch = SAMPLES.batch()
    encoder = Bert(CONFIG).eval()
    hidden = encoder(batch)
    assert hidden.shape == (batch.tokens.numel(), CONFIG.hidden_size)
    assert hidden.isfinite().all()  # pads too
    assert encoder.pooled(hidden, batch).shape == (len(SAMPLES.lengths), CONFIG.hidden_size)
