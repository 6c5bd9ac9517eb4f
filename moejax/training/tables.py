"""Tables of the hash router that don't come from its initialisation: from a file, or balanced by token frequency.

V vocabulary.
"""

import pathlib

import jax
import numpy as np

from moejax import config as config_lib
from moejax.data import pipeline
from moejax.models import model as model_lib
from moejax.ops import routing
from moejax.training import loss

NUM_COUNTED = 2**22  # tokens of the first training batches from which frequencies are estimated


def read(config: config_lib.Config) -> np.ndarray | None:
    """table_V of model.moe.hash_table=FILE.npy; None for any other.

    Raises:
      ConfigError: there is no such file, or it does not hold an expert for every token id.
    """
    c = config.model.moe
    if not (config.model.has_experts and c.router == "hash" and c.hash_table.endswith(".npy")):
        return None
    path = pathlib.Path(c.hash_table).expanduser()
    if not path.is_file():
        raise config_lib.ConfigError(f"model.moe.hash_table={c.hash_table}: there is no such file; name one")
    try:
        table_V = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise config_lib.ConfigError(
            f"model.moe.hash_table={c.hash_table} is no array of numpy ({error}); write it with numpy.save"
        ) from None
    if table_V.shape != (config.model.vocab_size,) or not np.issubdtype(table_V.dtype, np.integer):
        raise config_lib.ConfigError(
            f"model.moe.hash_table={c.hash_table} has shape {table_V.shape} of {table_V.dtype}; it must hold one whole "
            f"number for each of model.vocab_size={config.model.vocab_size} token ids"
        )
    outside = table_V[(table_V < 0) | (table_V >= c.num_experts)]
    if outside.size:
        raise config_lib.ConfigError(
            f"model.moe.hash_table={c.hash_table} names expert {outside[0]}; "
            f"its entries must lie in [0, model.moe.num_experts={c.num_experts})"
        )
    return table_V.astype(np.int32)


def balanced(config: config_lib.Config, data: pipeline.Data) -> np.ndarray | None:
    """table_V of model.moe.hash_table=balanced: experts share the tokens of the first training batches evenly."""
    c = config.model.moe
    if not (config.model.has_experts and c.router == "hash" and c.hash_table == "balanced"):
        return None
    frequency_V = np.ones(config.model.vocab_size, np.int64)  # 1: ids that are never seen are spread, too
    batches = pipeline.TrainBatches(data, config.data)
    num_rows = NUM_COUNTED // config.data.seq_length
    if data.train.num_rows is not None:
        num_rows = min(num_rows, data.train.num_rows)  # an epoch is enough
    for step in range(max(1, num_rows // config.data.batch_size)):
        batch = batches[step]
        for ids_BL, valid_BL in zip(*loss.tokens(batch), strict=True):
            np.add.at(frequency_V, ids_BL[valid_BL], 1)
    return routing.balanced_table(frequency_V, c.num_experts)


def fill(model: model_lib.Model, table_V: np.ndarray | None) -> None:
    """Gives every hash router of the model this table, in place; None leaves each its own random one."""
    if table_V is None:
        return
    for layer, _ in model_lib.moe_layers(model):
        state = layer.router.state
        assert state is not None
        old = state[...]
        state[...] = jax.device_put(np.broadcast_to(table_V, old.shape).copy(), old.sharding)
