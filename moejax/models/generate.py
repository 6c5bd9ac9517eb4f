"""Writing text with a language model, one token at a time, with a cache of constant size for Mamba layers.

B batch, L prompt length, N new tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models import lm


def sample(logits_BV: Array, key: Array, *, temperature: float, top_k: int) -> Array:
    """token_B drawn from softmax(logits / temperature) over the top_k most probable tokens.

    temperature=0 takes the most probable token; top_k=0 keeps all.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("num_tokens", "temperature", "top_k", "vocab_size"))
def generate(
    model: lm.Lm,
    prompt_BL: Array,
    key: Array,
    *,
    num_tokens: int,
    temperature: float,
    top_k: int,
    vocab_size: int,
    label_B: Array | None = None,
) -> Array:
    """Continues prompts of equal length by N tokens: tokens_BN.

    Args:
      model: the language model.
      prompt_BL: at least one token a row, the first of them the token that begins a document.
      key: a jax PRNG key.
      num_tokens: N.
      temperature: see `sample`.
      top_k: see `sample`.
      vocab_size: ids from here on are never drawn: the model may have more rows than its tokenizer has tokens.
      label_B: the label of each row's document, for router=label.
    """
    batch, length = prompt_BL.shape

    def read(carry, token_B):
        logits_BV, cache = model.step(token_B, carry[0], labels_B=label_B)
        return (cache, logits_BV), None

    def write(carry, key):
        cache, logits_BV = carry
        token_B = sample(logits_BV[:, :vocab_size], key, temperature=temperature, top_k=top_k)
        logits_BV, cache = model.step(token_B, cache, labels_B=label_B)
        return (cache, logits_BV), token_B

    carry = model.step(prompt_BL[:, 0], model.init_cache(batch, length + num_tokens), labels_B=label_B)[::-1]
    carry, _ = jax.lax.scan(read, carry, prompt_BL[:, 1:].T)
    _, tokens_NB = jax.lax.scan(write, carry, jax.random.split(key, num_tokens))
    return tokens_NB.T
