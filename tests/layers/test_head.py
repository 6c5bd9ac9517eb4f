"""A mixture of softmaxes is the distribution that its formula says, exactly, at the memory of one component."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import head

D, V = 4, 11


def make(num_softmaxes=3, d_model=D, dtype="float32", scheme="switch"):
    return head.MixtureOfSoftmaxes(
        d_model,
        num_softmaxes=num_softmaxes,
        scheme=scheme,
        init_scale=0.1,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(params=0),
    )


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_loops(x, prior, latent, vocabulary):
    """log sum_i g_i p_i in float64, one context and one component at a time."""
    log_p = np.zeros((*x.shape[:-1], vocabulary.shape[1]))
    for where in np.ndindex(*x.shape[:-1]):
        g, p = softmax(x[where] @ prior), 0.0
        for i in range(len(latent)):
            p = p + g[i] * softmax(np.tanh(x[where] @ latent[i]) @ vocabulary)
        log_p[where] = np.log(p)
    return log_p


def draw(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(module):
    return np.float64(module.prior[...]), np.float64(module.latent[...])


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("num_softmaxes", [1, 3])
def test_values_equal_loops_and_probabilities_sum_to_one(num_softmaxes, leading, fill):
    module, x, vocabulary = fill(lambda: make(num_softmaxes)), draw(*leading, D), draw(D, V, seed=2)
    log_p = jax.jit(module)(x, vocabulary)
    assert log_p.dtype == jnp.float32
    np.testing.assert_allclose(log_p, by_loops(np.float64(x), *weights(module), np.float64(vocabulary)), atol=1e-5)
    np.testing.assert_allclose(np.exp(np.float64(log_p)).sum(axis=-1), 1, rtol=1e-6)


def test_gradients_equal_differences_of_the_loops(fill, slope):
    """Of sum(w log p) in each input along a random direction; w does not sum to 0, as a likelihood's do not."""
    module, x, vocabulary, w = fill(make), draw(2, 3, D), draw(D, V, seed=2), draw(2, 3, V, seed=3) + 1
    inputs = {"x": np.float64(x), "vocabulary": np.float64(vocabulary)}
    inputs["prior"], inputs["latent"] = weights(module)

    def objective(module, x, vocabulary):
        return jnp.sum(w * module(x, vocabulary))

    of_module, of_x, of_vocabulary = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(module, x, vocabulary)
    gradients = {"x": of_x, "vocabulary": of_vocabulary, "prior": of_module.prior[...], "latent": of_module.latent[...]}
    for name, value in inputs.items():
        direction = np.random.default_rng(4).normal(size=value.shape)
        moved = slope(lambda v, name=name: np.sum(w * by_loops(**{**inputs, name: v})), value, direction)
        np.testing.assert_allclose(np.sum(np.float64(gradients[name]) * direction), moved, rtol=2e-4, err_msg=name)


def test_one_component_is_a_softmax_behind_a_tanh(fill):
    module, x, vocabulary = fill(lambda: make(1)), draw(5, D), draw(D, V, seed=2)
    plain = jax.nn.log_softmax(jnp.tanh(x @ module.latent[0]) @ vocabulary)
    np.testing.assert_allclose(jax.jit(module)(x, vocabulary), plain, atol=1e-5)
    prior = jax.jit(jax.grad(lambda m: m(x, vocabulary)[0, 0]))(module).prior
    assert not np.any(prior[...])  # there is nothing to choose


def test_equal_components_are_one_whatever_the_prior(fill):
    module, x, vocabulary = fill(make), draw(5, D), draw(D, V, seed=2)
    module.latent[...] = np.broadcast_to(module.latent[:1], module.latent.shape)
    plain = jax.nn.log_softmax(jnp.tanh(x @ module.latent[0]) @ vocabulary)
    np.testing.assert_allclose(jax.jit(module)(x, vocabulary), plain, atol=1e-5)


def test_a_cross_entropy_of_the_output_is_the_likelihood_of_the_mixture(fill):
    """Log-probabilities as logits: their logsumexp is 0, so that a softmax leaves them."""
    module, x, vocabulary = fill(make), draw(6, D), draw(D, V, seed=2)
    logits, targets = jax.jit(module)(x, vocabulary), np.arange(6)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), 0, atol=1e-6)
    nats = jax.nn.logsumexp(logits, axis=-1) - logits[targets, targets]
    expected = by_loops(np.float64(x), *weights(module), np.float64(vocabulary))
    np.testing.assert_allclose(nats, -expected[targets, targets], rtol=1e-5)


def test_probabilities_too_small_for_float32_keep_their_logarithm_and_gradient(fill):
    """Logits of hundreds: most probabilities are 0 in float32, where log(sum_i g_i p_i) would be -inf."""
    module, x, vocabulary = fill(make), draw(5, D), 200 * draw(D, V, seed=2)
    log_p = jax.jit(module)(x, vocabulary)
    assert np.min(log_p) < -150
    np.testing.assert_allclose(
        log_p, by_loops(np.float64(x), *weights(module), np.float64(vocabulary)), rtol=1e-4, atol=1e-3
    )
    gradients = jax.jit(jax.grad(lambda m, x, v: m(x, v).sum(), argnums=(0, 1, 2)))(module, x, vocabulary)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(gradients))


def rank(log_p):
    values = np.linalg.svd(np.float64(log_p), compute_uv=False)
    return int(np.sum(values > 1e-4 * values[0]))  # float32 leaves singular values of about 1e-6


def test_a_mixture_passes_the_rank_that_bounds_one_softmax(fill):
    """40 contexts by 30 words: log p of one softmax is a rank-D product less a number a context, so at most D + 1."""
    x, vocabulary = draw(40, D), draw(D, 30, seed=2)
    assert rank(jax.jit(fill(lambda: make(1), scale=1.0))(x, vocabulary)) == D + 1
    assert rank(jax.jit(fill(lambda: make(3), scale=1.0))(x, vocabulary)) > 3 * (D + 1)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_holds_one_component_at_a_time(backward):
    """Eight components need what two need, in arrays of contexts by vocabulary; each kept one would add one."""

    def temporaries(num_softmaxes):
        module = jax.eval_shape(lambda: make(num_softmaxes, d_model=8))
        x, vocabulary = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32), jax.ShapeDtypeStruct((8, 2048), jnp.float32)

        def total(module, x, vocabulary):
            return module(x, vocabulary)[..., 0].sum()

        function = jax.grad(total, argnums=(0, 1, 2)) if backward else total
        memory = jax.jit(function).lower(module, x, vocabulary).compile().memory_analysis()
        return memory.temp_size_in_bytes / (2 * 64 * 2048 * 4)

    assert temporaries(8) < temporaries(2) + 0.5


def test_bfloat16_products_give_float32_probabilities_over_float32_weights(fill):
    """To 2 % of a logit: bfloat16 keeps 8 bits. The probabilities still sum to 1, as the softmax is float32."""
    module, x, vocabulary = fill(lambda: make(dtype="bfloat16")), draw(5, D), draw(D, V, seed=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype("float32")}
    log_p = jax.jit(module)(x.astype(jnp.bfloat16), vocabulary)
    assert log_p.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(np.float64(log_p)).sum(axis=-1), 1, rtol=1e-6)
    exact = by_loops(np.float64(x), *weights(module), np.float64(vocabulary))
    assert 1e-4 < np.abs(log_p - exact).max() < 0.1  # the products did run in bfloat16
    single = jax.jit(fill(lambda: make(1, dtype="bfloat16")))  # where the prior, of the unrounded input, says nothing
    np.testing.assert_array_equal(single(x, vocabulary), single(x.astype(jnp.bfloat16), vocabulary))
    gradients = jax.jit(jax.grad(lambda m, v: m(x.astype(jnp.bfloat16), v)[0, 0], argnums=(0, 1)))(module, vocabulary)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("scheme", "bound"), [("switch", 2 * 0.05), ("moe_mamba", 0.2)])
def test_weights_start_in_the_scheme_of_the_config_with_logical_axes(scheme, bound):
    """sd = sqrt(0.1 / 40) = 0.05 before the cut, from d_model inputs."""
    module = make(8, d_model=40, scheme=scheme)
    assert module.prior.get_metadata()["axes"] == ("embed", "router")
    assert module.latent.get_metadata()["axes"] == ("softmax", "embed", "latent")
    latent = np.asarray(module.latent[...])
    assert latent.shape == (8, 40, 40)
    assert 0.9 * min(bound, 4 * 0.05) < np.abs(latent).max() <= bound * (1 + 1e-6)
    assert module.prior.shape == (40, 8)
    assert len({float(matrix[0, 0]) for matrix in latent}) == 8  # no two components start equal
