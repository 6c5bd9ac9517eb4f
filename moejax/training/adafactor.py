"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) for parameters that hold many matrices.

The update of a matrix is optax's: scaled by a factored mean of its squared gradients, clipped by its root mean square,
and times that of the matrix. But our parameters are stacks: of periods, of experts, of query, key and value, of the
halves of a gated activation. Each of their matrices has rows, columns, clipping and scale of its own, as if it were a
parameter of its own, and the two dims of heads are one. That is what T5X does by its logical factor rules, where
layers, stacks and experts are "batch" dims, and heads and their width are both columns (t5x/adafactor.py,
t5x/contrib/moe/adafactor_utils.py). One difference: T5X factors every stacked matrix, however small, and we those
alone that it would factor by themselves. Mesh-TensorFlow (optimize.py) has statistics of each expert too, but clips and
scales the experts of a layer together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from moejax import config as config_lib
from moejax import partition

# Logical axes that are not the rows or the columns of a matrix. Dims in front of the named ones are stacks: periods.
_STACKS = ("expert", "qkv", "kv", "half", "softmax")  # a matrix for each
_JOINED = ("head", "slot")  # one dim with the axis before: heads of a width, experts of some slots


class Layout(NamedTuple):
    """How a parameter holds its matrices (or vectors, or scalars).

    stacks: the dims over matrices. stack_axes: logical axes of those that have one, which are the last.
    shape, axes: of a matrix.
    """

    stacks: tuple[int, ...]
    stack_axes: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def layout(variable: nnx.Variable) -> Layout:
    """The layout of a parameter, by its logical axes.

    Raises:
      ValueError: what remains of its dims is no matrix; the table of this module lacks an axis.
    """
    axes = variable.get_metadata()["axes"]
    unnamed = len(variable.shape) - len(axes)
    stacks, stack_axes = list(range(unnamed)), []
    shape, matrix_axes = [], []
    for dim, (axis, size) in enumerate(zip(axes, variable.shape[unnamed:], strict=True), start=unnamed):
        if axis in _STACKS:
            stacks.append(dim)
            stack_axes.append(axis)
        elif axis in _JOINED:
            shape[-1] *= size
        else:
            shape.append(size)
            matrix_axes.append(axis)
    if len(shape) > 2:
        raise ValueError(f"the axes {axes} of a parameter give matrices of {len(shape)} dims; add stacks to _STACKS")
    return Layout(tuple(stacks), tuple(stack_axes), tuple(shape), tuple(matrix_axes))


def scale_by_adafactor(config: config_lib.AdafactorConfig) -> optax.GradientTransformation:
    """The direction of an update, to be times the learning rate, of a tree of `nnx.Variable` with logical axes.

    The state is optax's FactoredState, its trees made of `nnx.Param` with logical axes: what a mesh splits of a
    parameter it splits of its statistics. A matrix whose dims are both at least min_factored_dim has the means of its
    rows and columns, any other the mean of each square; of what it does not have there is one zero.
    """
    squares = optax.scale_by_factored_rms(
        decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_factored_dim, epsilon=config.eps
    )
    clip = optax.clip_by_block_rms(config.clip_rms) if config.clip_rms else optax.identity()
    scale = optax.scale_by_param_block_rms(config.min_scale) if config.scale_by_parameter else optax.identity()
    bound = optax.chain(clip, scale)

    def init(params: Any) -> optax.FactoredState:
        def of(variable: nnx.Variable) -> dict[str, nnx.Param]:
            here = layout(variable)
            stack_shape = tuple(variable.shape[dim] for dim in here.stacks)
            state = jax.eval_shape(squares.init, jax.ShapeDtypeStruct(here.shape, variable.dtype))
            return {
                name: nnx.Param(
                    jnp.zeros((*stack_shape, *getattr(state, name).shape), jnp.float32), axes=(*here.stack_axes, *axes)
                )
                for name, axes in _moment_axes(here, config.min_factored_dim).items()
            }

        leaves, structure = jax.tree.flatten(params, is_leaf=partition.is_variable)
        moments = list(map(of, leaves))
        trees = {name: structure.unflatten([moment[name] for moment in moments]) for name in ("v_row", "v_col", "v")}
        return optax.FactoredState(count=jnp.zeros((), jnp.int32), **trees)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def of(parameter: nnx.Variable, *others: nnx.Variable) -> tuple[nnx.Variable, ...]:
            here = layout(parameter)

            def of_matrix(weight: Array, gradient: Array, *moments: Array) -> tuple[Any, ...]:
                shape, weight = weight.shape, weight.reshape(here.shape)
                before = optax.FactoredState(state.count, *moments)
                scaled, after = squares.update(gradient.reshape(here.shape), before, weight)
                assert isinstance(after, optax.FactoredState)
                direction: Any = bound.update(scaled, bound.init(weight), weight)[0]
                return direction.reshape(shape), after.v_row, after.v_col, after.v

            for outer, dim in reversed(list(enumerate(here.stacks))):
                dim -= outer  # as the function inside sees it: the stacks further out are gone
                of_matrix = jax.vmap(of_matrix, in_axes=(dim, dim, 0, 0, 0), out_axes=(dim, 0, 0, 0))
            arrays = of_matrix(parameter[...], *(other[...] for other in others))
            return tuple(other.replace(array) for other, array in zip(others, arrays, strict=True))

        leaves, structure = jax.tree.flatten(params, is_leaf=partition.is_variable)
        others = (structure.flatten_up_to(tree) for tree in (updates, state.v_row, state.v_col, state.v))
        results = zip(*(of(*variables) for variables in zip(leaves, *others, strict=True)), strict=True)
        directions, v_row, v_col, v = (structure.unflatten(column) for column in results)
        return directions, optax.FactoredState(state.count + 1, v_row, v_col, v)

    return optax.GradientTransformation(init, update)


def _moment_axes(here: Layout, min_factored_dim: int) -> dict[str, tuple[str, ...]]:
    """Logical axes of a matrix's statistics. optax calls the smaller dim, and the first of equals, the rows."""
    unused = ("unused",)
    if len(here.shape) < 2 or min(here.shape) < min_factored_dim:
        return {"v_row": unused, "v_col": unused, "v": here.axes}
    rows, columns = np.argsort(here.shape)
    return {"v_row": (here.axes[rows],), "v_col": (here.axes[columns],), "v": unused}
