"""The arrays of an example of span corruption: they fit exactly, lose nothing, and depend on (seed, row) alone."""

import numpy as np
import pytest
import slow_corruption
from slow_corruption import EOS, FIRST, NUM, PAD, make_row, make_tokens

from moejax import config as config_lib
from moejax.data import corruption

# ---- The arrays of an example ----


def test_a_row_worked_by_hand():
    # Half of four tokens in spans of one: kept, noise, kept, noise is the only mask.
    row = make_row(
        [5, 6, 7, 8], inputs_length=7, targets_length=6, noise_density=0.5, mean_span_length=1.0, first_sentinel=99
    )
    expected = {
        "encoder_inputs_L": [5, 99, 7, 98, EOS, PAD, PAD],
        "encoder_mask_L": [True] * 5 + [False] * 2,
        "decoder_inputs_M": [PAD, 99, 6, 98, 8, EOS],
        "targets_M": [99, 6, 98, 8, EOS, PAD],
        "loss_mask_M": [True] * 5 + [False],
    }
    assert {name: values.tolist() for name, values in row.items()} == expected
    assert {name: values.dtype for name, values in row.items()} == {
        name: np.dtype(bool if "mask" in name else np.int32) for name in expected
    }


def test_568_tokens_fill_512_and_114_exactly():
    tokens = make_tokens(568)
    for index in range(200):
        row = make_row(tokens, row=index)
        assert [len(values) for values in row.values()] == [512, 512, 114, 114, 114]
        assert row["encoder_mask_L"].all()
        assert row["loss_mask_M"].all()
        assert row["encoder_inputs_L"][-1] == row["targets_M"][-1] == EOS


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.8, 1.0)])
@pytest.mark.parametrize("inputs_length", [3, 4, 11, 32, 64])
def test_every_length_up_to_the_raw_length_fits_and_is_restored(inputs_length, density, mean):
    tokens_length, targets_length = corruption.raw_length(inputs_length, density, mean)
    for length in range(1, tokens_length + 1):
        tokens = make_tokens(length, length)
        row = make_row(
            tokens,
            inputs_length=inputs_length,
            targets_length=targets_length,
            noise_density=density,
            mean_span_length=mean,
            row=length,
        )
        mask = corruption.noise_mask(length, density, mean, 0, length)
        inputs, targets = slow_corruption.slow_corrupt(tokens, mask, FIRST)
        for name, sequence, size in (("encoder", inputs, inputs_length), ("target", targets, targets_length)):
            ids, is_token = (
                ("encoder_inputs_L", "encoder_mask_L") if name == "encoder" else ("targets_M", "loss_mask_M")
            )
            padding = size - len(sequence) - 1
            assert row[ids].tolist() == [*sequence, EOS] + [PAD] * padding
            assert row[is_token].tolist() == [True] * (len(sequence) + 1) + [False] * padding
        assert row["decoder_inputs_M"].tolist() == [PAD, *row["targets_M"][:-1].tolist()]
        inputs = row["encoder_inputs_L"][row["encoder_mask_L"]][:-1]
        targets = row["targets_M"][row["loss_mask_M"]][:-1]
        np.testing.assert_array_equal(slow_corruption.restore(inputs, targets, FIRST, NUM), tokens)


def test_masks_tell_padding_from_tokens_of_the_same_id():
    row = make_row([7, 7, 7], inputs_length=6, targets_length=5, end_of_text=7, pad=7)
    assert row["encoder_inputs_L"].tolist() == [7, 7, FIRST, 7, 7, 7]
    assert row["encoder_mask_L"].tolist() == [True] * 4 + [False] * 2
    assert row["targets_M"].tolist() == [FIRST, 7, 7, 7, 7]
    assert row["loss_mask_M"].tolist() == [True] * 3 + [False] * 2


def test_one_token_has_the_target_eos_and_none_make_padding():
    one, none = (make_row(tokens, inputs_length=4, targets_length=3) for tokens in ([9], []))
    assert one["encoder_inputs_L"].tolist() == [9, EOS, PAD, PAD]
    assert one["targets_M"].tolist() == [EOS, PAD, PAD]
    assert one["loss_mask_M"].tolist() == [True, False, False]
    assert {value for values in none.values() for value in values.tolist()} == {PAD}
    assert [len(values) for values in none.values()] == [4, 4, 3, 3, 3]


def test_a_row_depends_on_seed_and_row_alone():
    tokens = make_tokens(568)

    def row(seed, index):
        return b"".join(values.tobytes() for values in make_row(tokens, seed=seed, row=index).values())

    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = {key: row(*key) for key in keys}
    assert {key: row(*key) for key in reversed(keys)} == rows
    assert len(set(rows.values())) == 4


@pytest.mark.parametrize(
    ("inputs_length", "targets_length", "length"), [(512, 114, 569), (511, 114, 568), (512, 113, 568)]
)
def test_what_does_not_fit_is_refused_not_cut(inputs_length, targets_length, length):
    with pytest.raises(ValueError, match=rf"{length} raw tokens become .* take both lengths from raw_length"):
        make_row(make_tokens(length), inputs_length=inputs_length, targets_length=targets_length)


def test_a_row_with_more_spans_than_sentinels_is_refused():
    with pytest.raises(config_lib.ConfigError, match="has 28 noise spans, but there are 27 sentinels"):
        make_row(make_tokens(568), num_sentinels=27)


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_density_out_of_range_is_refused(density):
    for call in (lambda: corruption.counts(10, density, 3.0), lambda: corruption.raw_length(10, density, 3.0)):
        with pytest.raises(config_lib.ConfigError, match=rf"data.noise_density={density} must lie between 0 and 1"):
            call()


@pytest.mark.parametrize("mean", [0.0, 0.99, float("inf"), float("nan")])
def test_a_mean_span_length_out_of_range_is_refused(mean):
    with pytest.raises(config_lib.ConfigError, match=rf"data.mean_span_length={mean} must be 1 or more"):
        corruption.noise_mask(10, 0.15, mean, 0, 0)


@pytest.mark.parametrize("inputs_length", [0, 2])
def test_an_encoder_without_room_for_a_span_is_refused(inputs_length):
    with pytest.raises(config_lib.ConfigError, match=f"data.seq_length={inputs_length} is too short"):
        corruption.raw_length(inputs_length, 0.15, 3.0)
