"""A count is kept, and is that of the model as it is now."""

from moejax import config as config_lib
from moejax.sweep import cost


def test_counts_that_are_kept_are_those_of_the_model_as_it_is_now():
    model = config_lib.ModelConfig(d_model=16, vocab_size=300, period=("mlp",), num_periods=1)
    before = cost.parameters(model)
    before["total"] = 0
    model.mlp.d_ff += 1
    assert cost.parameters(model)["total"] == 300 * 16 + 2 * 16 * 1025 + 2 * 16
    model.mlp.d_ff -= 1
    assert cost.parameters(model)["total"] == 300 * 16 + 2 * 16 * 1024 + 2 * 16
