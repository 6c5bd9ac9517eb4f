"""Parameters of a model by their paths, and tensors of others by their names."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax import partition

Module = TypeVar("Module", bound=nnx.Module)


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable of a model or a layer by its dotted path, e.g. "periods.blocks.0.norm.scale"."""
    leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=partition.is_variable)
    return {_dotted(path): variable for path, variable in leaves}


def replace(module: Module, values: Mapping[str, Any]) -> Module:
    """The same with these values, one a path of `parameters`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(jnp.array(values[_dotted(path)]).reshape(variable.shape)),
        module,
        is_leaf=partition.is_variable,
    )


def tensor(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The tensor of this name; None in a shape is any size, that of the model's width.

    Raises:
      ConfigError: it is missing, or of another shape, or of a dtype that float32 does not hold exactly.
    """
    sizes = str(shape).replace("None", "d_model")
    if name not in tensors:
        raise config_lib.ConfigError(
            f"{name} is missing, of shape {sizes}; add it, or mend the config that asks for it"
        )
    found = tensors[name]
    if not isinstance(found, np.ndarray):
        raise config_lib.ConfigError(f"{name} is a {type(found).__name__}, not a numpy array; convert it")
    fits = found.ndim == len(shape) and all(b in (a, None) for a, b in zip(found.shape, shape, strict=True))
    if not fits:
        raise config_lib.ConfigError(f"{name} has shape {found.shape}, but it must have {sizes}; mend it or the config")
    if not (jnp.issubdtype(found.dtype, jnp.floating) and np.can_cast(found.dtype, np.float32)):
        raise config_lib.ConfigError(
            f"{name} has dtype {found.dtype}, which float32 does not hold exactly; cast it to float32"
        )
    return found


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
