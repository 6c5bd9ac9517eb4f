"""The nearest value is the one that trying all of them finds, and few are tried."""

import pytest

from moejax import config as config_lib
from moejax.rules import checks
from moejax.sweep import solve

FUNCTIONS = {
    "line": lambda x: 37 + 11.5 * x,
    "through 0": lambda x: 3 * x,
    "square": lambda x: x * x,
    "cube and line": lambda x: x**3 + 1000 * x,
    "root": lambda x: 1000 * x**0.5,
    "steps": lambda x: 10 * (x // 7) + 0.001 * x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bounds", [{"least": 1}, {"least": 0, "most": 300}, {"least": 1, "multiple_of": 8}])
def test_nearest_is_the_best_of_all(name, bounds):
    function, step = FUNCTIONS[name], bounds.get("multiple_of", 1)
    values = range(0 if bounds["least"] == 0 else step, bounds.get("most", 600) + 1, step)
    for target in (0, 40, 1003, 3000, 9999, 20_000):
        best = min(abs(function(value) - target) for value in values)
        for start in (1, 50, 299):
            found = solve.nearest(function, target, start=start, **bounds)
            assert found in values or function(values[-1]) < target  # it may go on beyond what was tried
            assert abs(function(found) - target) <= best


def test_a_line_is_asked_for_five_times_at_most():
    for start in (1, 40, 5000):
        for target in (100, 12_345.6, 1e6):
            asked = []
            solve.nearest(lambda x, asked=asked: asked.append(x) or 7 + 3.25 * x, target, start=start, least=1)
            assert len(asked) <= 5


def test_what_does_not_grow_has_no_nearest():
    assert solve.nearest(lambda _: 5.0, 7.0, start=3, least=1) is None
    assert solve.nearest(lambda x: -x, 7.0, start=3, least=1) is None


@pytest.mark.parametrize("field", solve.LINEAR)
def test_parameters_are_a_straight_line_of_the_fields_that_are_called_so(field):
    config = config_lib.Config()
    model = config.model = config_lib.ModelConfig(d_model=16, vocab_size=300, period=("mamba_moe",), num_periods=1)
    model.mamba.moe_projections = ("conv", "out")
    model.moe = config_lib.MoeConfig(router="noisy_top_k", num_shared_experts=2, bias=True, activation="swiglu")
    for name in ("active", "total"):
        values = []
        for size in (1, 2, 9):
            checks.put(config, field, size)
            values.append(solve.measure(name, config))
        assert values[2] - values[0] == 8 * (values[1] - values[0])
        assert values[1] > values[0] or (field, name) == ("model.moe.top_k", "total")
