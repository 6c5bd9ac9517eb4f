"""Switch's router in training: how it explores (Table 11) and in which precision (Table 2)."""

# B rows, L positions, D model, E experts, T tokens

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import config as config_lib
from moejax.layers import router as router_lib

ROWS, LENGTH, WIDTH, EXPERTS = 4, 512, 16, 4


@pytest.fixture(scope="module", name="x_BLD")
def draw():
    return np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def make(**settings):
    config = config_lib.MoeConfig(router="switch", num_experts=EXPERTS, **settings)
    return router_lib.Router(WIDTH, config, vocab_size=0, scheme="switch", init_scale=4.0, rngs=nnx.Rngs(params=1))


def tokens_of(x_BLD, seed=5):
    keys_B = jax.random.split(jax.random.key(seed), len(x_BLD))
    return router_lib.Tokens(valid_BL=jnp.ones(x_BLD.shape[:2], bool), keys_B=keys_B)


def call(router, x_BLD, *, train=True, seed=5):
    """(expert_T, gate_T, prob_TE, logits_TE) of all tokens, as float64."""
    found, logits_GTE = router(x_BLD, tokens_of(x_BLD, seed), group_size=LENGTH, capacity=1, train=train)
    arrays = (found.expert_TK[..., 0], found.gate_TK[..., 0], found.prob_TE, logits_GTE)
    return [np.asarray(array, float).reshape(ROWS * LENGTH, *array.shape[2:]) for array in arrays]


def softmax(logits_TE):
    power_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return power_TE / power_TE.sum(axis=1, keepdims=True)


def test_argmax_is_evaluation(x_BLD):
    trained, evaluated = (call(make(exploration="argmax"), x_BLD, train=train) for train in (True, False))
    for ours, expected in zip(trained, evaluated, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_jitter_and_dropout_change_the_routers_input(x_BLD):
    x_TD = x_BLD.reshape(-1, WIDTH).astype(float)
    dropout = {"exploration": "dropout", "router_dropout": 0.25}
    for settings, low, high in (({"jitter": 0.5}, 0.5, 1.5), (dropout, 0, 4 / 3)):
        router = make(**settings)
        router.weight.set_value(jnp.pad(jnp.eye(EXPERTS), ((0, WIDTH - EXPERTS), (0, 0))))  # logits are channels
        expert_T, gate_T, prob_TE, logits_TE = call(router, x_BLD)
        factor_TE = logits_TE / x_TD[:, :EXPERTS]
        assert factor_TE.min() >= low - 1e-5
        assert factor_TE.max() <= high + 1e-5
        assert factor_TE.mean() == pytest.approx(1, abs=0.02)  # 8,192 draws of deviation 0.6 at most
        if settings is dropout:
            assert np.mean(np.abs(factor_TE) < 1e-6) == pytest.approx(0.25, abs=0.02)
            assert np.all((np.abs(factor_TE) < 1e-6) | (np.abs(factor_TE - 4 / 3) < 1e-4))
        np.testing.assert_array_equal(expert_T, logits_TE.argmax(axis=1))
        np.testing.assert_allclose(prob_TE, softmax(logits_TE), atol=1e-6)
        np.testing.assert_allclose(gate_T, prob_TE.max(axis=1), atol=1e-6)


def test_a_sampled_expert_is_drawn_by_its_probability_which_is_its_gate(x_BLD):
    router = make(exploration="sample")
    same_BLD = np.broadcast_to(x_BLD[:1, :1], x_BLD.shape)  # so that all tokens have the same probabilities
    expert_T, gate_T, prob_TE, logits_TE = call(router, same_BLD)
    expected_E = softmax(logits_TE)[0]
    share_E = np.bincount(expert_T.astype(int), minlength=EXPERTS) / len(expert_T)
    np.testing.assert_allclose(share_E, expected_E, atol=4 * 0.5 / np.sqrt(len(expert_T)))
    assert (expected_E > 0.02).sum() > 1  # else it would be an argmax
    np.testing.assert_allclose(gate_T, expected_E[expert_T.astype(int)], rtol=1e-5)
    np.testing.assert_allclose(prob_TE[0], expected_E, rtol=1e-5)
    assert np.any(call(router, same_BLD, seed=6)[0] != expert_T)
    assert len(set(call(router, same_BLD, train=False)[0])) == 1


def test_sampling_trains_the_router_through_the_gate(x_BLD):
    router = make(exploration="sample")

    def gates(router):
        return router(x_BLD, tokens_of(x_BLD), group_size=LENGTH, capacity=1, train=True)[0].gate_TK.sum()

    slope_DE = np.asarray(jax.grad(gates)(router).weight[...], float)
    expert_T, gate_T, prob_TE, _ = call(router, x_BLD)
    chosen_TE = np.eye(EXPERTS)[expert_T.astype(int)]
    expected_DE = x_BLD.reshape(-1, WIDTH).astype(float).T @ (gate_T[:, None] * (chosen_TE - prob_TE))
    np.testing.assert_allclose(slope_DE, expected_DE, rtol=1e-4, atol=1e-3 * np.abs(expected_DE).max())


def test_a_router_in_bfloat16_rounds_logits_probabilities_and_gates(x_BLD):
    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), float)

    exact, coarse = make(exploration="argmax"), make(exploration="argmax", router_dtype="bfloat16")
    expert_T, gate_T, prob_TE, logits_TE = call(coarse, x_BLD)
    for array in (gate_T, prob_TE, logits_TE):
        np.testing.assert_array_equal(array, rounded(array))
    product_TE = rounded(x_BLD.reshape(-1, WIDTH)) @ rounded(coarse.weight[...])
    np.testing.assert_allclose(logits_TE, product_TE, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(prob_TE, softmax(logits_TE), rtol=2**-7)
    np.testing.assert_allclose(gate_T, prob_TE[np.arange(len(expert_T)), expert_T.astype(int)], rtol=2**-7)
    assert np.mean(expert_T != call(exact, x_BLD)[0]) > 0  # near ties are decided otherwise
