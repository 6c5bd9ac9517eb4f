"""A config's model in small: the same kinds of layers, router and experts, quick to compile; and a batch for it.

B batch, L sequence; of an encoder-decoder, L of the encoder and M of the decoder.
"""

import copy
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from moejax import config as config_lib
from moejax.config import plain
from moejax.data import corruption
from moejax.rules import checks
from moejax.rules import model as model_rules


def reduce(config: config_lib.Config, named: Collection[str], num_devices: int) -> config_lib.Config:
    """The config with small widths, few layers and short rows, for meshes of up to num_devices.

    What is kept: the kinds of sublayers, the router and all its settings, the number of experts and of shared ones,
    activations, norms, noise, and whether a routing group is a part of a row, a row or several rows.

    Args:
      config: validated; it stays as it is.
      named: fields that the user set, by dotted path ("model.d_model"); they are not changed.
      num_devices: widths, rows and positions are multiples of it.

    Raises:
      ConfigError: the rules of config.model allow nothing as small with the fields that are named.
    """
    small = copy.deepcopy(config)
    model, moe, length = small.model, small.model.moe, config.data.seq_length

    def up(size: int) -> int:
        return num_devices * math.ceil(size / num_devices)

    used = {"mlp": model.uses("mlp"), "moe": model.has_experts, "mamba2": model.uses("mamba2")}
    used["mamba"] = model.uses("mamba") or model.uses("mamba_moe")

    def change(path: str, value: Any) -> None:
        group = path.rpartition(".")[0]
        if path not in named and used.get(group.removeprefix("model."), True):
            checks.put(small, path, value)

    def at_most(path: str, size: int) -> None:
        change(path, min(checks.get(small, path), size))

    for part in ("prefix", "period", "suffix", "encoder_period"):
        change(f"model.{part}", tuple(dict.fromkeys(getattr(model, part))))  # each kind once, in order
    at_most("model.num_periods", 2)
    at_most("model.num_encoder_periods", 2)
    at_most("model.attention.d_head", 4)
    at_most("model.vocab_size", up(64))
    at_most("model.mamba.d_state", 4)
    at_most("model.mamba.dt_rank", 2)
    change("model.mamba.chunk_size", 2)
    at_most("model.mamba2.d_state", 4)
    change("model.mamba2.chunk_size", 4)
    at_most("model.mlp.d_ff", up(16))
    at_most("model.moe.d_expert", up(16))
    if config_lib.SCANS.get(model.mamba.scan):  # a kernel of another platform
        change("model.mamba.scan", "auto")
    if moe.hash_table.endswith(".npy"):  # an entry for each token of the whole vocabulary
        change("model.moe.hash_table", "random")
    at_most("training.num_microbatches", 4)
    at_most("data.seq_length", up(32))
    if moe.group_size:
        row = small.data.seq_length
        change("model.moe.group_size", 2 * row if moe.group_size > length else max(1, row * moe.group_size // length))
    model.compute_dtype = "float32"
    change("data.batch_size", num_rows(small, num_devices))

    if "model.d_model" not in named:
        _narrow(model, "model.mamba2.d_head" in named, up(16), num_devices)
    model_rules.validate(model)
    model_rules.validate_objective(small)
    model_rules.validate_causal(small)
    return small


def _narrow(model: config_lib.ModelConfig, keep_heads: bool, least: int, multiple: int) -> None:
    """Gives the model the least width that its rules allow, with heads of Mamba-2 that any mesh can share."""
    for width in range(least, model.d_model, multiple):
        trial = copy.deepcopy(model)
        trial.d_model = width
        if trial.uses("mamba2") and not keep_heads:
            heads = math.lcm(multiple, trial.mamba2.num_groups)
            trial.mamba2.d_head = max(1, int(trial.mamba2.expand * width) // heads)
        try:
            model_rules.validate(trial)
        except config_lib.ConfigError:
            continue
        model.d_model, model.mamba2.d_head = width, trial.mamba2.d_head
        return


def num_rows(config: config_lib.Config, num_devices: int) -> int:
    """Rows that any mesh and microbatch count can share in whole groups, and with which most experts get tokens."""
    model, moe, length = config.model, config.model.moe, config.data.seq_length
    rows = num_devices * math.lcm(2, config.training.num_microbatches)
    if not model.has_experts:
        return rows
    rows *= math.lcm(moe.group_size or length, length) // length
    wanted = 8 * moe.num_experts // moe.num_choices
    return rows * max(1, math.ceil(wanted / (rows * length)))


def changes(config: config_lib.Config, small: config_lib.Config) -> dict[str, Any]:
    """The fields that `reduce` changed, by dotted path, and what they are now."""
    return {path: new for path, _, new in plain.differences(config, small)}


def batch(config: config_lib.Config) -> dict[str, np.ndarray]:
    """Rows of random tokens: several documents each, padding after most, one of padding alone; by data.seed alone.

    Inside a row, or a group of rows, no token comes twice while the vocabulary lasts: two tokens that are alike would
    tie in a router that compares tokens, and rounding would choose between them.
    """
    rng, vocab = np.random.default_rng(config.data.seed), config.model.vocab_size
    shape = (config.data.batch_size, config.data.seq_length)
    inputs_BL, length_B1 = _inputs(rng, shape, vocab)
    if config.model.has_encoder:
        shape = (shape[0], corruption.row_lengths(config.data)[1])
        decoder_inputs_BM, decoder_length_B1 = _inputs(rng, shape, vocab)
        return {
            "encoder_inputs_BL": inputs_BL,
            "encoder_mask_BL": np.arange(inputs_BL.shape[1]) < length_B1,
            "decoder_inputs_BM": decoder_inputs_BM,
            "targets_BM": rng.integers(0, vocab, size=shape, dtype=np.int32),
            "loss_mask_BM": np.arange(shape[1]) < decoder_length_B1,
        }
    place_BL = np.broadcast_to(np.arange(shape[1]), shape)
    starts_BL = rng.random(shape) < 3 / shape[1]  # three more documents a row or so
    starts_BL[:, 0] = True
    document_BL = np.cumsum(starts_BL, axis=1)
    valid_BL = place_BL < length_B1
    first_BL = np.maximum.accumulate(np.where(starts_BL, place_BL, 0), axis=1)
    isolated = config.data.isolate_documents
    label_BL = rng.integers(-1, config.model.moe.num_experts, size=shape)
    arrays = {
        "inputs_BL": inputs_BL,
        "targets_BL": rng.integers(0, vocab, size=shape),
        "segment_ids_BL": np.where(valid_BL, document_BL if isolated else 1, 0),
        "positions_BL": place_BL - first_BL if isolated else place_BL,
        "labels_BL": np.take_along_axis(label_BL, first_BL, axis=1),  # one a document; -1 where it has none
    }
    mask_BL = valid_BL & np.roll(~starts_BL, -1, axis=1)  # the last token of a document predicts nothing
    return {name: array.astype(np.int32) for name, array in arrays.items()} | {"loss_mask_BL": mask_BL}


def _inputs(rng: np.random.Generator, shape: tuple[int, int], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 token ids, length_B1 of rows before their padding)."""
    num_tokens = math.prod(shape)
    shuffled = [rng.permutation(vocab) for _ in range(math.ceil(num_tokens / vocab))]
    length_B1 = rng.integers(max(1, 3 * shape[1] // 4), shape[1] + 1, size=(shape[0], 1))
    length_B1[1:][-1:] = 0
    return np.concatenate(shuffled)[:num_tokens].reshape(shape).astype(np.int32), length_B1
