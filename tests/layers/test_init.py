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
