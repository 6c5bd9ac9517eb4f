"""Initialisers have the spread and the bounds that their papers give."""

import functools
import math

import jax
import numpy as np
import pytest

from moejax.layers import init

KEY = jax.random.key(0)


@pytest.mark.parametrize(("shape", "fan_in"), [((100, 200), None), ((4, 50, 100), 25)])
def test_scaled_normal_is_cut_at_two_standard_deviations(shape, fan_in):
    """sd = sqrt(s / fan_in) before the cut; a normal cut at 2 sd keeps 0.8796 of it. 20,000 draws: 2 % is 4 sigma."""
    draw = jax.jit(functools.partial(init.scaled_normal, shape=shape, scale=0.1, fan_in=fan_in))
    values, sd = np.asarray(draw(KEY)), math.sqrt(0.1 / (fan_in or shape[-2]))
    assert values.shape == shape
    assert values.dtype == np.float32
    assert 1.98 * sd < np.abs(values).max() <= 2 * sd * (1 + 1e-6)
    assert values.std() == pytest.approx(0.8796 * sd, rel=0.02)
    assert abs(values.mean()) < 4 * sd / math.sqrt(values.size)


def normal(x):
    """The distribution function of a standard normal."""
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


@pytest.mark.parametrize(
    ("scheme", "fan_in", "cut"),
    [
        ("switch", 1, 2.0),
        ("switch", 160, 2.0),
        ("moe_mamba", 1, 0.6325),  # an embedding: sd 0.3162, cut at 0.2
        ("moe_mamba", 10, 2.0),  # sd 0.1
        ("moe_mamba", 40, 4.0),  # sd 0.05
        ("moe_mamba", 2048, 28.62),  # nothing is cut
    ],
)
def test_weights_are_drawn_again_beyond_the_cut_of_their_scheme(scheme, fan_in, cut):
    """The distribution is that of a normal inside the cut, in units of sd = sqrt(0.1 / fan_in).

    40,000 draws: the greatest distance of the two distribution functions passes 0.0098 once in a thousand times.
    Clipped values would differ by the mass beyond the cut: 0.023 at 2 sd, 0.26 at 0.63.
    """
    draw = jax.jit(functools.partial(init.weight, shape=(200, 200), scheme=scheme, scale=0.1, fan_in=fan_in))
    values, sd = np.asarray(draw(KEY)), math.sqrt(0.1 / fan_in)
    assert values.shape == (200, 200)
    assert values.dtype == np.float32
    bound = 2 * sd if scheme == "switch" else 0.2
    assert bound == pytest.approx(cut * sd, rel=1e-3)
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert cut > 3 or np.abs(values).max() > 0.99 * bound
    mass = normal(cut) - normal(-cut)
    distance = (normal(np.sort(values.ravel()) / sd) - normal(-cut)) / mass - (
        np.arange(values.size) + 0.5
    ) / values.size
    assert np.abs(distance).max() < 0.0098
    # var = 1 - 2 cut density(cut) / mass
    after = sd * math.sqrt(1 - 2 * cut * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi) / mass)
    assert values.std() == pytest.approx(after, rel=0.015)


def test_the_fan_in_of_a_weight_is_its_second_dim_from_the_end():
    for scheme in ("switch", "moe_mamba"):
        weight = functools.partial(init.weight, KEY, (3, 40, 5), scheme=scheme, scale=0.1)
        np.testing.assert_array_equal(weight(), weight(fan_in=40))


def test_the_switch_scheme_is_scaled_normal():
    weight = init.weight(KEY, (4, 8), scheme="switch", scale=0.1)
    np.testing.assert_array_equal(weight, init.scaled_normal(KEY, (4, 8), scale=0.1))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match=r"model\.init=xavier is not known; choose one of switch, moe_mamba"):
        init.weight(KEY, (4, 8), scheme="xavier", scale=0.1)


@pytest.mark.parametrize(("shape", "fan_in"), [((100, 200), None), ((20_000,), 4)])
def test_uniform_fan_in_fills_its_bounds_evenly(shape, fan_in):
    """+-1/sqrt(fan_in), with the standard deviation bound / sqrt(3) of a uniform."""
    values = np.asarray(jax.jit(functools.partial(init.uniform_fan_in, shape=shape, fan_in=fan_in))(KEY))
    bound = 1 / math.sqrt(fan_in or shape[-2])
    assert 0.999 * bound < np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(values.mean()) < 0.02 * bound


def test_dt_bias_makes_the_initial_dt_log_uniform():
    """ln dt has the mean and the spread of a uniform on [ln 0.001, ln 0.1], and stays inside."""
    bias = np.float64(jax.jit(functools.partial(init.dt_bias, shape=(20_000,), dt_min=0.001, dt_max=0.1))(KEY))
    dt = np.log1p(np.exp(bias))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert np.log(dt).mean() == pytest.approx(math.log(0.01), abs=0.05)
    assert np.log(dt).std() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.02)


def test_dt_bias_has_a_floor():
    bias = np.float64(jax.jit(functools.partial(init.dt_bias, shape=(100,), dt_min=1e-7, dt_max=1e-6))(KEY))
    np.testing.assert_allclose(np.log1p(np.exp(bias)), 1e-4, rtol=1e-3)
