"""What layers send between devices where `mesh.sequence` splits the rows, by the compiled programs; nothing runs.

    python scripts/bench_sequence.py                             # Mamba and attention, d_model 512, L=2048 and 8192
    python scripts/bench_sequence.py --layers mamba --lengths 4096

On eight virtual CPU devices, data=2 x sequence=4, a row a device of `data`; forward and backward. Beside our programs
those that XLA makes of the same layer and the same placement by itself. MiB a device; all-reduce are sums of the
weights' gradients.
"""

import argparse
import collections
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import config, partition
from moejax.analysis import collectives, program
from moejax.layers import block

ROWS = 2
OPERATIONS = ("collective-permute", "all-gather", "reduce-scatter", "all-to-all", "all-reduce")


def main() -> None:
    """Compiles, and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", nargs="+", default=["mamba", "attention"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--width", type=int, default=512)
    a = parser.parse_args()
    mesh = partition.make_mesh(config.MeshConfig(data=2, sequence=4))
    place, everywhere = partition.batch_sharding(mesh), partition.replicated(mesh)

    def loss(layer: nnx.Module, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        return jnp.sum(layer(x_BLD, segment_ids_BL=segment_ids_BL)[0] ** 2)  # pyright: ignore[reportCallIssue]

    step = jax.value_and_grad(loss, argnums=(0, 1))
    print(f"{'':<31}" + "".join(f"{name:>20}" for name in (*OPERATIONS, "temporary MiB")))
    for kind in a.layers:
        model = config.ModelConfig(d_model=a.width, period=(kind,))
        layer = jax.eval_shape(lambda kind=kind, model=model: block.Block(kind, model, rngs=nnx.Rngs(0)))
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), layer)
        for length in a.lengths:
            x_BLD = jax.ShapeDtypeStruct((ROWS, length, a.width), jnp.float32, sharding=place)
            ids_BL = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=place)
            for name, function in (("ours", partition.on_mesh(mesh, step)), ("XLA alone", step)):
                compiled = jax.jit(function).lower(layer, x_BLD, ids_BL).compile()
                sent = collections.Counter()
                for one in collectives.collectives(program.parse(compiled.as_text() or ""), mesh):
                    sent[one.kind] += one.result_bytes
                memory = compiled.memory_analysis()
                assert memory is not None
                figures = (*(sent[operation] for operation in OPERATIONS), memory.temp_size_in_bytes)
                cells = "".join(f"{figure / 2**20:>20,.2f}" for figure in figures)
                print(f"{kind:<12}{length:>7}  {name:<10}{cells}", flush=True)


if __name__ == "__main__":
    main()
