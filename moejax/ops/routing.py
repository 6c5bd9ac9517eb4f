"""Routers: from logits to an Assignment of tokens to experts.

T tokens, E experts, K experts a token. Everything here is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Assignment(NamedTuple):
    """Which experts each token chose, and how much each counts.

    expert_TK: int32, in order of preference; E means no expert (a padding token).
    gate_TK: float32 weight of the expert's output, differentiable in the logits.
    prob_TE: float32 router probabilities, for the balance losses and statistics.
    """

    expert_TK: Array
    gate_TK: Array
    prob_TE: Array


def top_k(logits_TE: Array, *, k: int, valid_T: Array | None = None) -> Assignment:
    """Each token chooses its k most probable experts; a gate is the softmax probability, not renormalised.

    With k=1 this is the Switch router (arXiv 2101.03961, eq. 1-2). Ties go to the expert with the lower index.

    Args:
      logits_TE: router logits.
      k: experts a token, at most E.
      valid_T: False for padding tokens, which choose no expert and have gate 0.
    """
    prob_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    gate_TK, expert_TK = jax.lax.top_k(prob_TE, k)
    if valid_T is not None:
        expert_TK = jnp.where(valid_T[:, None], expert_TK, logits_TE.shape[-1])
        gate_TK = jnp.where(valid_T[:, None], gate_TK, 0.0)
    return Assignment(expert_TK=expert_TK.astype(jnp.int32), gate_TK=gate_TK, prob_TE=prob_TE)
