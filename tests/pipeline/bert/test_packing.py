"""Packing: every token exactly once, whole samples, few rows; by property and by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from pipeline.bert.packing import END_TO_END, PADDED, ROWS, STREAM, arrangement, pack

SEQ_LEN = 32
LENGTHS = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=40)


def samples(lengths, seed=0):
    """Distinct tokens, so that a wrong place cannot look right, and a random B."""
    length = np.array(lengths)
    b_start = np.random.default_rng(seed).integers(1, length + 1)
    return np.arange(1, length.sum() + 1, dtype=np.uint32), length, b_start


def fill(batch):
    """Share of slots that hold a real token."""
    return batch.slot.numel() / batch.tokens.numel()


@settings(deadline=None)
@given(lengths=LENGTHS, arranged=st.sampled_from([ROWS, PADDED, END_TO_END, STREAM]))
def test_every_token_stands_once_with_its_position_and_segment_in_a_stretch_of_its_sample(lengths, arranged):
    tokens, length, b_start = samples(lengths)
    batch = pack(tokens, length, b_start, SEQ_LEN, arranged)

    slot, width = batch.slot, batch.tokens.shape[1]
    assert torch.equal(batch.tokens.flatten()[slot], torch.from_numpy(tokens.astype(np.int64)))
    assert len(set(slot.tolist())) == tokens.size
    pads = torch.ones(batch.tokens.numel(), dtype=torch.bool)
    pads[slot] = False
    assert (batch.tokens.flatten()[pads] == 0).all()

    ends = np.cumsum(length)
    for number, (end, size, begin) in enumerate(zip(ends, length, b_start, strict=True)):
        own = slot[end - size : end]
        assert own[0] == batch.first[number]
        assert size == batch.length[number]
        assert torch.equal(own, torch.arange(own[0].item(), own[0].item() + size))  # whole and in one piece
        assert own[0] // width == own[-1] // width  # in one row
        assert batch.positions.flatten()[own].tolist() == list(range(size))
        assert batch.segments.flatten()[own].tolist() == [int(i >= begin) for i in range(size)]

    stretches = list(itertools.pairwise(batch.cu.tolist()))
    assert (batch.cu[0], batch.cu[-1]) == (0, batch.tokens.numel())
    assert all(0 <= stop - start <= SEQ_LEN == batch.seq_len for start, stop in stretches)
    own_stretches = set(zip(batch.first.tolist(), (batch.first + batch.length).tolist(), strict=True))
    assert own_stretches <= set(stretches)  # what is left is pads, none of it beside a token
    assert all(pads[start:stop].all() for start, stop in stretches if (start, stop) not in own_stretches)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_a_stream_keeps_the_order_and_its_number_of_stretches_follows_from_that_of_the_samples(lengths):
    batch = pack(*samples(lengths), SEQ_LEN, STREAM)
    total = sum(lengths)
    assert batch.tokens.shape == (1, -(-total // 256) * 256)
    assert torch.equal(batch.slot, torch.arange(total))
    assert len(batch.cu) == len(lengths) + 1 + 8  # 255 pads in stretches of at most 32
    assert fill(pack(*samples(lengths), SEQ_LEN, END_TO_END)) == 1


def test_padded_rows_hold_one_sample_each():
    batch = pack(*samples([5, 3, 8]), SEQ_LEN, PADDED)
    assert batch.first.tolist() == [0, 8, 16]


def test_the_arrangement_depends_on_device_length_and_purpose_only():
    assert [arrangement("cpu", tokens) for tokens in (128, 192, 200, 512)] == [ROWS, ROWS, END_TO_END, END_TO_END]
    assert arrangement("cpu", 128, predicting=True) == END_TO_END
    assert {arrangement("cuda", 128), arrangement("cuda", 512, predicting=True)} == {STREAM}


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_no_row_is_needless_and_every_call_gives_the_same(lengths):
    tokens, length, b_start = samples(lengths)
    batch, again = (pack(tokens, length, b_start, SEQ_LEN) for _ in range(2))
    held = torch.bincount(batch.slot // batch.tokens.shape[1]).sort().values
    assert len(held) == 1 or held[0] + held[1] > SEQ_LEN  # no two rows could have been one
    assert held[-1] <= batch.tokens.shape[1] < held[-1] + 8
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(batch).items() if name != "seq_len")


def test_best_fit_takes_the_tightest_row():
    batch = pack(*samples([12, 8, 20, 24]), SEQ_LEN)  # in the order given, 12 + 8 would share a row
    assert batch.tokens.shape == (2, SEQ_LEN)
    assert fill(batch) == 1
    # 18 | 17 | 10, 4 go beside 18 | 9 goes beside 17 (6 left, not into 18's 0) | 6 closes the second row
    assert fill(pack(*samples([18, 17, 10, 4, 9, 6]), SEQ_LEN)) == 1


def test_rows_are_cut_to_the_fullest_one():
    batch = pack(*samples([5, 3]), SEQ_LEN)
    assert batch.tokens.shape == (1, 8)
    assert pack(*samples([5, 4]), SEQ_LEN).tokens.shape == (1, 16)


def test_realistic_lengths_fill_the_rows():
    """Two thirds full rows and a uniform rest, as the pair procedure gives at 128 tokens (84 % unpacked)."""
    source = np.random.default_rng(0)
    fills = []
    for _ in range(20):
        length = np.where(source.random(64) < 2 / 3, 128, source.integers(5, 129, 64))
        fills.append(fill(pack(np.ones(length.sum()), length, length, 128)))
    assert np.mean(fills) > 0.96


def test_a_batch_moves_whole():
    batch = pack(*samples([5, 3]), SEQ_LEN).to("meta")
    assert {value.device.type for name, value in vars(batch).items() if name != "seq_len"} == {"meta"}
    assert batch.seq_len == SEQ_LEN


@pytest.mark.parametrize(
    ("lengths", "total", "message"),
    [
        ([], 0, "0 samples"),
        ([4, 33], 37, "sample 1 of the micro-batch has 33 tokens; a row holds 1 to 32"),
        ([4, 0], 4, "sample 1 of the micro-batch has 0 tokens"),
        ([4, 5], 10, "add up to 9 tokens, but 10 were given"),
    ],
)
def test_impossible_samples_are_refused(lengths, total, message):
    with pytest.raises(DataError, match=message):
        pack(np.ones(total), np.array(lengths, dtype=int), np.array(lengths, dtype=int), SEQ_LEN)
