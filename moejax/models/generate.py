"""Writing text with a language model: prompts are read in parallel, then tokens are drawn one after another.

B batch, L prompt length, C tokens a call, K candidates, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.models import encoder_decoder
from moejax.models import model as model_lib

CHUNK = 16  # tokens a row that one call of the device draws at most


class Settings(NamedTuple):
    """How tokens are drawn from logits: see `sample`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(
    logits_BV: Array, keys_B: Array, *, temperature: float | Array, top_k: int, top_p: float | Array = 1.0
) -> Array:
    """token_B drawn from softmax(logits / temperature) over the candidates, each row by its own key.

    The candidates are the top_k most probable tokens (0: all), and of those the nucleus (Holtzman et al. 2020,
    arXiv 1904.09751): with the probabilities of the top_k summing to 1, the smallest set of most probable tokens whose
    probability reaches top_p. Of equally probable tokens the lower ids come first. temperature=0 takes the most
    probable token.
    """
    vocab_size = logits_BV.shape[1]

    def draw() -> Array:
        # less the largest: dividing by a small temperature can't overflow then
        scaled_BV = (logits_BV - logits_BV.max(axis=1, keepdims=True)) / temperature
        if top_k:
            return among(min(top_k, vocab_size), scaled_BV)
        return jax.lax.cond(
            top_p < 1,
            functools.partial(among, vocab_size),
            lambda scaled_BV: jax.vmap(jax.random.categorical)(keys_B, scaled_BV),
            scaled_BV,
        )

    def among(num_candidates: int, scaled_BV: Array) -> Array:
        scaled_BK, token_BK = jax.lax.top_k(scaled_BV, num_candidates)  # in descending order
        prob_BK = jax.nn.softmax(scaled_BK, axis=1)
        before_BK = jnp.cumsum(prob_BK, axis=1) - prob_BK  # what is more probable
        scaled_BK = jnp.where((before_BK < top_p) | (top_p >= 1), scaled_BK, -jnp.inf)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BK)
        return jnp.take_along_axis(token_BK, chosen_B[:, None], axis=1)[:, 0]

    greedy = lambda: jnp.argmax(logits_BV, axis=1)  # noqa: E731
    return jax.lax.cond(temperature > 0, draw, greedy).astype(jnp.int32)


class _State(NamedTuple):
    """Between two tokens. token_B: the newest one, which the cache has not read; count: how many were drawn."""

    cache: Any
    token_B: Array
    done_B: Array
    count: Array


class _Rows(NamedTuple):
    """What stays the same over all tokens. start: before the first of them, in an encoder-decoder."""

    keys_B: Array
    labels_B: Array | None
    start: Array
    end_of_text: Array
    temperature: Array
    top_p: Array


_unstack = jax.jit(model_lib.unstack)


def _draw(logits_BV: Array, rows: _Rows, count: Array, *, top_k: int, vocab_size: int) -> Array:
    # A row's n-th token has a key of its own, whatever else is in the batch.
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, count))(rows.keys_B)
    return sample(logits_BV[:, :vocab_size], keys_B, temperature=rows.temperature, top_k=top_k, top_p=rows.top_p)


@functools.partial(jax.jit, static_argnames=("max_length", "top_k", "vocab_size"))
def _begin(
    model: model_lib.Model,
    tokens_BL: Array,
    valid_BL: Array,
    rows: _Rows,
    *,
    max_length: int,
    top_k: int,
    vocab_size: int,
) -> _State:
    """Reads the prompts and draws the first token."""
    how = {"max_length": max_length, "valid_BL": valid_BL}
    if isinstance(model, encoder_decoder.EncoderDecoder):
        logits_BV, cache = model.prefill(tokens_BL, start_B=jnp.full(len(tokens_BL), rows.start), **how)
    else:
        logits_BV, cache = model.prefill(tokens_BL, labels_B=rows.labels_B, **how)
    count = jnp.zeros((), jnp.int32)
    token_B = _draw(logits_BV, rows, count, top_k=top_k, vocab_size=vocab_size)
    return _State(cache, token_B, token_B == rows.end_of_text, count + 1)


# donated: the cache is written in place
@functools.partial(jax.jit, static_argnames=("top_k", "vocab_size"), donate_argnames=("state",))
def _advance(
    model: model_lib.Model, state: _State, rows: _Rows, num_tokens: Array, *, top_k: int, vocab_size: int
) -> tuple[_State, Array]:
    """Draws num_tokens <= CHUNK more tokens a row, fewer if all rows are done: (state, tokens_BC)."""
    batch = state.token_B.shape[0]

    def more(carry: tuple[_State, Array, Array]) -> Array:
        state, _, place = carry
        return (place < num_tokens) & ~state.done_B.all()

    def step(carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, tokens_BC, place = carry
        if isinstance(model, encoder_decoder.EncoderDecoder):
            logits_BV, cache = model.step(state.token_B, state.cache)
        else:
            logits_BV, cache = model.step(state.token_B, state.cache, labels_B=rows.labels_B)
        token_B = _draw(logits_BV, rows, state.count, top_k=top_k, vocab_size=vocab_size)
        token_B = jnp.where(state.done_B, rows.end_of_text, token_B)
        state = _State(cache, token_B, state.done_B | (token_B == rows.end_of_text), state.count + 1)
        return state, tokens_BC.at[:, place].set(token_B), place + 1

    tokens_BC = jnp.full((batch, CHUNK), rows.end_of_text, jnp.int32)
    state, tokens_BC, _ = jax.lax.while_loop(more, step, (state, tokens_BC, jnp.zeros((), jnp.int32)))
    return state, tokens_BC


class Writer:
    """Continues prompts, a few tokens a call; of an encoder-decoder, writes what belongs to its inputs.

    A row's tokens depend on its prompt, its key and the settings, and (up to rounding) on no other row. A row that has
    drawn end_of_text is done, and repeats it from then on.
    """

    def __init__(
        self,
        model: model_lib.Model,
        prompts: Sequence[Sequence[int]],
        keys_B: Array,
        *,
        num_tokens: int,
        settings: Settings,
        vocab_size: int,
        end_of_text: int,
        labels_B: np.ndarray | None = None,
        start: int = 0,
    ):
        """Reads the prompts.

        Args:
          model: the language model; a copy of its parameters is made (`model.unstack`).
          prompts: token ids of each row, one at least, the first of them the token that begins a document; of an
            encoder-decoder, its inputs, with the token that ends them.
          keys_B: a jax PRNG key a row.
          num_tokens: how many tokens will be drawn at most: room for them is made in the cache.
          settings: how they are drawn.
          vocab_size: ids from here on are never drawn: the model may have more rows than its tokenizer has tokens.
          end_of_text: the id that ends a row; -1 for none.
          labels_B: the label of each row's document, for router=label.
          start: of an encoder-decoder, the id before the first target.

        Raises:
          ValueError: a prompt without a token.
        """
        if not all(prompts):
            raise ValueError("a prompt has no token; begin it with the token that begins a document")
        length = padded_length(max(map(len, prompts)))
        tokens_BL = np.zeros((len(prompts), length), np.int32)
        valid_BL = np.arange(length) < np.array([len(prompt) for prompt in prompts])[:, None]
        tokens_BL[valid_BL] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
        self.model = model if model_lib.stacks(model)[-1].periods is None else _unstack(model)
        self.static = {"top_k": settings.top_k, "vocab_size": vocab_size}
        self.rows = _Rows(
            keys_B,
            None if labels_B is None else jnp.asarray(labels_B),
            jnp.asarray(start, jnp.int32),
            jnp.asarray(end_of_text, jnp.int32),
            jnp.asarray(settings.temperature, jnp.float32),
            jnp.asarray(settings.top_p, jnp.float32),
        )
        self.left = num_tokens
        # without attention one program serves every num_tokens
        together = max(length, num_tokens) if isinstance(model, encoder_decoder.EncoderDecoder) else length + num_tokens
        self.max_length = padded_length(together) if cache_size(model, length).grows else length
        self.state = _begin(self.model, tokens_BL, valid_BL, self.rows, max_length=self.max_length, **self.static)
        self.first = True
        # of no token: compiles, so that the first call takes no longer than the others
        self.state, _ = _advance(self.model, self.state, self.rows, jnp.asarray(0), **self.static)

    def done(self) -> np.ndarray:
        """done_B: which rows have ended, by the tokens that `advance` gave; all of them, once it gave the last."""
        return np.asarray(self.state.done_B) & (not self.first) | (self.left == 0)

    def stop(self, done_B: np.ndarray) -> None:
        """Ends rows."""
        self.state = self.state._replace(done_B=jnp.asarray(done_B) | self.state.done_B)

    def advance(self, num_tokens: int = CHUNK) -> np.ndarray:
        """The next tokens_BC, C of num_tokens or fewer; in a row that ends, end_of_text follows."""
        num_tokens = min(num_tokens, CHUNK, self.left)
        if self.first and num_tokens:
            self.first, self.left = False, self.left - 1
            return np.asarray(self.state.token_B)[:, None]
        before = int(self.state.count)
        self.state, tokens_BC = _advance(self.model, self.state, self.rows, jnp.asarray(num_tokens), **self.static)
        drawn = int(self.state.count) - before
        self.left -= drawn
        return np.asarray(tokens_BC)[:, :drawn]


def padded_length(length: int) -> int:
    """A length up to which prompts are padded: few of them, as each compiles a program, and at most a fourth more."""
    multiple = 1 << max(4, length.bit_length() - 3)
    return -(-length // multiple) * multiple


class CacheSize(NamedTuple):
    """What a row's cache takes. grows: with its length, which is then bounded by what was asked for."""

    num_bytes: int
    grows: bool


def cache_size(model: model_lib.Model, max_length: int) -> CacheSize:
    """Of one row of at most max_length positions."""

    def num_bytes(length: int) -> int:
        shapes = jax.eval_shape(lambda: model.init_cache(1, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    return CacheSize(num_bytes(max_length), num_bytes(max_length + 1) > num_bytes(max_length))
