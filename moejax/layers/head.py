"""Heads of the language model beyond one product with the vocabulary.

D model, M components of the mixture, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.layers import init


class MixtureOfSoftmaxes(nnx.Module):
    """p(y|x) = sum_i g_i(x) p(y|x, z=i): a mixture read as a distribution (Yang et al. 2018, arXiv 1711.03953).

    g = softmax(x prior) chooses a component, p(.|x, z=i) = softmax(tanh(x latent_i) vocabulary) speaks for it; the
    components share the vocabulary. One softmax gives a matrix of log-probabilities (contexts x vocabulary) of rank
    at most D + 1, whatever it is trained on; a mixture is not bound by that.

    __call__(x_D, vocabulary_DV) -> log p(y|x), float32 over any leading dims. It is normalised, so it serves as logits.
    """

    def __init__(
        self, d_model: int, *, num_softmaxes: int, scheme: str, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dtype = dtype

        def weight(*shape: int) -> Array:
            return init.weight(rngs.params(), shape, scheme=scheme, scale=init_scale)

        self.prior = nnx.Param(weight(d_model, num_softmaxes), axes=("embed", "router"))
        self.latent = nnx.Param(weight(num_softmaxes, d_model, d_model), axes=("softmax", "embed", "latent"))

    def __call__(self, x_D: Array, vocabulary_DV: Array) -> Array:
        # float32 throughout, like a router's: by default TPUs and GPUs would round the inputs
        prior_M = jnp.matmul(x_D.astype(jnp.float32), self.prior[...], precision=jax.lax.Precision.HIGHEST)
        return _mixture(
            x_D.astype(self.dtype),
            jnp.moveaxis(jax.nn.log_softmax(prior_M, axis=-1), -1, 0),
            self.latent[...].astype(self.dtype),
            vocabulary_DV.astype(self.dtype),
        )


def _component(x_D: Array, log_prior: Array, latent_DD: Array, vocabulary_DV: Array) -> Array:
    """log g_i + log p(y|x, z=i), float32: products in the inputs' dtype, accumulated in float32."""
    latent_D = jnp.tanh(jnp.matmul(x_D, latent_DD, preferred_element_type=jnp.float32)).astype(x_D.dtype)
    logits_V = jnp.matmul(latent_D, vocabulary_DV, preferred_element_type=jnp.float32)
    return log_prior[..., None] + jax.nn.log_softmax(logits_V, axis=-1)


# A rule of its own, as differentiating the scan would keep the running sum of every component, M arrays [..., V], even
# with the components rematerialised. The final log p is enough: it gives each component's share of p.
@jax.custom_vjp
def _mixture(x_D: Array, log_prior_M: Array, latent_MDD: Array, vocabulary_DV: Array) -> Array:
    """logsumexp_i of the components, one at a time; log_prior_M has its M in front."""

    def add(log_p_V: Array, component: tuple[Array, Array]) -> tuple[Array, None]:
        return jnp.logaddexp(log_p_V, _component(x_D, *component, vocabulary_DV)), None

    nothing_V = jnp.full((*x_D.shape[:-1], vocabulary_DV.shape[-1]), -jnp.inf, jnp.float32)
    log_p_V, _ = jax.lax.scan(add, nothing_V, (log_prior_M, latent_MDD))
    return log_p_V


def _forward(x_D: Array, log_prior_M: Array, latent_MDD: Array, vocabulary_DV: Array):
    log_p_V = _mixture(x_D, log_prior_M, latent_MDD, vocabulary_DV)
    return log_p_V, (x_D, log_prior_M, latent_MDD, vocabulary_DV, log_p_V)


def _backward(residuals: tuple[Array, ...], cotangent_V: Array):
    """d log p = sum_i r_i d(log g_i + log p_i), with r_i(y) = g_i p_i(y) / p(y) the posterior of the component."""
    x_D, log_prior_M, latent_MDD, vocabulary_DV, log_p_V = residuals

    def add(sums, component: tuple[Array, Array]):
        log_joint_V, pull = jax.vjp(_component, x_D, *component, vocabulary_DV)
        x_bar_D, log_prior_bar, latent_bar_DD, vocabulary_bar_DV = pull(cotangent_V * jnp.exp(log_joint_V - log_p_V))
        return (sums[0] + x_bar_D, sums[1] + vocabulary_bar_DV), (log_prior_bar, latent_bar_DD)

    zeros = jnp.zeros(x_D.shape, jnp.float32), jnp.zeros(vocabulary_DV.shape, jnp.float32)  # summed in float32
    (x_bar_D, vocabulary_bar_DV), (log_prior_bar_M, latent_bar_MDD) = jax.lax.scan(
        add, zeros, (log_prior_M, latent_MDD)
    )
    return x_bar_D.astype(x_D.dtype), log_prior_bar_M, latent_bar_MDD, vocabulary_bar_DV.astype(vocabulary_DV.dtype)


_mixture.defvjp(_forward, _backward)
