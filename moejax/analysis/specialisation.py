"""What each expert takes of the held-out split: its tokens, its share of each label, and the experts chosen with it.

T tokens (not padding), M MoE layers, E experts, N labels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moejax.analysis import token_names
from moejax.data import tokenizers
from moejax.layers import moe
from moejax.models import model as model_lib
from moejax.training import evaluate, loss

NUM_TOKENS = 8  # listed for an expert
MIN_COUNT = 5  # a token that an expert takes less often says little about it


class Choices:
    """The choices of a split, gathered while it is evaluated: two bytes a token and MoE layer, and six a token."""

    def __init__(self):
        self._tokens: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._preferred: list[np.ndarray] = []
        self._count_ME: Any = 0
        self._together_MEE: Any = None

    def watch(self, step: evaluate.EvalStep) -> evaluate.EvalStep:
        """The same step, which also notes the choices of every batch that it runs on."""

        def watched(model: model_lib.Model, batch: dict[str, jax.Array]) -> dict[str, Any]:
            sums = jax.device_get(step(model, batch))
            if sums["moe"] is not None:
                self.add({name: np.asarray(array) for name, array in batch.items()}, sums["moe"])
            return sums

        return watched

    def add(self, batch: dict[str, np.ndarray], aux: moe.MoeAux) -> None:
        """Notes a batch; aux: of all MoE layers, stacked, as numpy arrays."""
        assert aux.preferred_BL is not None
        ids_BL, valid_BL = (np.concatenate(of_stacks, axis=1) for of_stacks in loss.tokens(batch))
        self._tokens.append(ids_BL[valid_BL].astype(np.int32))
        if "labels_BL" in batch:
            self._labels.append(batch["labels_BL"][valid_BL].astype(np.int16))
        self._preferred.append(np.asarray(aux.preferred_BL)[:, valid_BL].astype(np.int16))
        self._count_ME = self._count_ME + np.asarray(aux.count_E, np.float64)
        if aux.together_EE is not None:
            together_MEE = np.asarray(aux.together_EE, np.int64)
            self._together_MEE = together_MEE if self._together_MEE is None else self._together_MEE + together_MEE

    def summary(self, tokenizer: tokenizers.Tokenizer, labels: Sequence[str]) -> dict[str, Any]:
        """What eval.json holds under "routing", ready for JSON.

        A token belongs to its preferred expert, the one with the largest gate. Shares of nothing are None.

        Returns:
          min_count: how often an expert takes a token that is listed, at least.
          labels: their names; label_tokens: how many tokens have each. Both empty if the batches had no labels.
          layers: of each MoE layer
            load: each expert's share of the choices, before capacity.
            preferred: each expert's share of the tokens.
            tokens: for each expert, what `characteristic` lists: {"token", "count", "share", "lift"}.
            labels: for each expert, its share of the tokens of each label.
            coactivation: [i][j] is how many tokens chose both i and j, [i][i] how many chose i; None if tokens have
              one choice.
        """
        tokens_T, preferred_MT = np.concatenate(self._tokens), np.concatenate(self._preferred, axis=1)
        labels_T = np.concatenate(self._labels) if self._labels else np.full(len(tokens_T), -1)
        label_names = list(labels) if self._labels else []
        num_experts = self._count_ME.shape[-1]
        label_tokens_N = np.bincount(labels_T[labels_T >= 0], minlength=len(label_names))
        layers = []
        for layer, every_T in enumerate(preferred_MT):
            mine_T = every_T >= 0  # of an encoder-decoder, a layer has the tokens of its stack
            preferred_T, ids_T = every_T[mine_T], tokens_T[mine_T]
            table_EN = _table(preferred_T, labels_T[mine_T], num_experts, len(label_names))
            together_MEE = self._together_MEE
            layers.append(
                {
                    "load": _shares(self._count_ME[layer], self._count_ME[layer].sum()),
                    "preferred": _shares(np.bincount(preferred_T, minlength=num_experts)[:num_experts], len(ids_T)),
                    "tokens": _tokens(ids_T, preferred_T, num_experts, tokenizer),
                    "labels": _shares(table_EN, label_tokens_N),
                    "coactivation": None if together_MEE is None else together_MEE[layer].tolist(),
                }
            )
        return {
            "min_count": MIN_COUNT,
            "labels": label_names,
            "label_tokens": label_tokens_N.tolist(),
            "layers": layers,
        }


def characteristic(
    tokens_T: np.ndarray, mine_T: np.ndarray, *, num_tokens: int = NUM_TOKENS, min_count: int = MIN_COUNT
) -> list[tuple[int, int, float, float]]:
    """The tokens that set an expert's choice apart from the whole, the most telling first.

    A token's share p of the expert's tokens and q of all tokens give its lift p / q. Tokens are ranked by their part in
    the divergence of the expert's tokens from all tokens, p ln(p / q): a token counts by how often the expert takes it
    and by how much oftener than chance. Those with a lift of 1 or less are left out, and rare ones.

    Args:
      tokens_T: ids.
      mine_T: which tokens the expert takes.
      num_tokens: how many to list at most.
      min_count: how often the expert takes a token that is listed, at least.

    Returns:
      (id, count, share p, lift) of each.
    """
    id_V, place_T, total_V = np.unique(tokens_T, return_inverse=True, return_counts=True)
    count_V = np.bincount(place_T[mine_T], minlength=len(id_V))
    share_V = count_V / max(1, count_V.sum())
    lift_V = share_V / (total_V / len(tokens_T))
    listed = np.flatnonzero((count_V >= min_count) & (lift_V > 1))
    score = share_V[listed] * np.log(lift_V[listed])
    best = listed[np.argsort(-score, kind="stable")][:num_tokens]
    return [(int(id_V[i]), int(count_V[i]), float(share_V[i]), float(lift_V[i])) for i in best]


def _tokens(
    tokens_T: np.ndarray, preferred_T: np.ndarray, num_experts: int, tokenizer: tokenizers.Tokenizer
) -> list[list[dict[str, Any]]]:
    listed = []
    for expert in range(num_experts):
        rows = characteristic(tokens_T, preferred_T == expert)
        names = token_names.names(tokenizer, [row[0] for row in rows])
        listed.append(
            [
                {"token": name, "count": count, "share": round(share, 6), "lift": round(lift, 4)}
                for name, (_, count, share, lift) in zip(names, rows, strict=True)
            ]
        )
    return listed


def _table(preferred_T: np.ndarray, labels_T: np.ndarray, num_experts: int, num_labels: int) -> np.ndarray:
    """count_EN: tokens of each label that each expert takes."""
    counted_T = (labels_T >= 0) & (preferred_T < num_experts)
    pair_T = preferred_T[counted_T].astype(np.int64) * num_labels + labels_T[counted_T]
    return np.bincount(pair_T, minlength=num_experts * num_labels).reshape(num_experts, num_labels)


def _shares(part: np.ndarray, whole: np.ndarray | float) -> list[Any]:
    """part / whole, rounded for JSON; None where the whole is 0."""
    share = (part / np.maximum(whole, 1)).round(6).astype(object)
    share[..., np.asarray(whole) == 0] = None
    return share.tolist()
