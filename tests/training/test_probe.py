"""Churn is the share of the probe's tokens whose expert changed, also across an interruption."""

import numpy as np

from moejax.training import probe


def test_churn_is_the_share_of_changed_tokens_a_layer(tmp_path):
    first, second = np.array([[0, 1, 2, 3], [3, 3, 3, 3]], np.int16), np.array([[0, 1, 3, 3], [0, 0, 0, 3]], np.int16)
    seen = probe.Probe(tmp_path, step=0)
    assert seen.churn(first, 10) is None
    np.testing.assert_array_equal(seen.churn(second, 20), [0.25, 0.75])
    np.testing.assert_array_equal(seen.churn(second, 30), [0, 0])


def test_a_run_that_goes_on_compares_with_the_last_evaluation_up_to_its_checkpoint(tmp_path):
    values = {step: np.full((1, 4), step, np.int16) for step in (10, 20, 30)}
    before = probe.Probe(tmp_path, step=0)
    for step, preferred in values.items():
        before.churn(preferred, step)
    resumed = probe.Probe(tmp_path, step=20)  # step 30 was after the checkpoint, and is done again
    np.testing.assert_array_equal(resumed.churn(values[20], 30), [0])
    anew = probe.Probe(tmp_path, step=5)
    assert anew.churn(values[10], 10) is None
