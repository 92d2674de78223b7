"""The model's configuration: what is refused, and that transformers understands it."""

import pytest
import transformers

from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.errors import ConfigError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(("size", "rows"), [(30522, 30528), (30528, 30528), (1, 8), (591, 592)])
def test_the_vocabulary_is_padded_to_a_multiple_of_8(size, rows):
    assert padded_vocab(size) == rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size = 32 is not divisible by model.num_attention_heads = 5"),
        ({"hidden_size": 0}, "hidden_size = 0: must be a whole number above 0"),
        ({"hidden_size": True}, "hidden_size = True: must be a whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob = 1.0: must be a number from 0 to below 1"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob = nan"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu': must be one of erf, tanh"),
        ({"init": "zeros"}, "init = 'zeros': must be one of bert, nvidia"),
        ({"vocab_size": 30522}, "vocab_size = 30522: must be a multiple of 8; the next is 30528"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ConfigError) as caught:
        BertConfig(**SMALL | wrong)
    assert message in str(caught.value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        BertConfig(vocab_size=64, hidden_act="relu", init="zeros")
    assert len(str(caught.value).splitlines()) == 2


def test_plain_values_come_back():
    config = BertConfig(**SMALL, hidden_act="tanh", init="nvidia")
    assert BertConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown name hidden;"):
        BertConfig.from_dict(config.to_dict() | {"hidden": 1})
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        BertConfig.from_dict({})


@pytest.mark.parametrize("act", ["erf", "tanh"])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(act):
    config = BertConfig(**SMALL, hidden_act=act, hidden_dropout_prob=0.2)
    theirs = transformers.BertConfig(**config.to_hugging_face(vocab_size=60, pad_token_id=3))
    assert (theirs.vocab_size, theirs.hidden_dropout_prob, theirs.pad_token_id) == (60, 0.2, 3)
    assert theirs.layer_norm_eps == 1e-12
    assert BertConfig.from_hugging_face(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', known are gelu"),
        ({"model_type": "roberta"}, "model_type is 'roberta', needed is 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_other_models_are_refused(wrong, message):
    with pytest.raises(ConfigError) as caught:
        BertConfig.from_hugging_face(BertConfig(**SMALL).to_hugging_face(vocab_size=60) | wrong)
    assert message in str(caught.value)
