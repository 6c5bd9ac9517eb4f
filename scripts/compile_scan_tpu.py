"""What the selective scan takes on TPUs that are not here: memory on a device and compile time, by TPU's own compiler.

    pip install -e .[tpu]                              # libtpu; no TPU is needed
    python scripts/compile_scan_tpu.py                 # 4 rows a device, L=2048, I=1024, N=16
    python scripts/compile_scan_tpu.py --rows=16 --length=1024 --dtype=bfloat16 --topologies v5e:2x2

Rows, packed with documents, are split over all devices of the topology. Inputs are u, dt, A, B, C, D, segment ids and,
with the backward pass, the gradient of y; outputs are y and the gradients of all inputs. Temporary memory is what the
compiled program reserves in HBM beside them; what fits into buffers of outputs that are written later is not in it.
"""

import argparse
import functools
import importlib.util
import os
import sys
import time

# libtpu would ask a cloud machine what it is, and warn where there is none
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moejax import config, partition
from moejax.ops import scan


def main() -> None:
    """Compiles and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--implementations", nargs="+", default=["pallas_tpu", "associative"])
    for name, default in (("rows", 4), ("length", 2048), ("inner", 1024), ("state", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of u, B, C, D and y")
    a = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, which holds the TPU compiler, is not installed; run pip install -e .[tpu]")

    sizes = f"{a.rows} rows a device, L={a.length} I={a.inner} N={a.state}, {a.dtype}"
    print(f"{sizes}, jax {jax.__version__}; MB a device")
    print(f"{'':<11}{'':<13}{'':<20}{'in + out':>9}{'temporary':>11}{'ratio':>7}{'compile s':>11}")
    for topology in a.topologies:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = partition.make_mesh(config.MeshConfig(), devices)
        split, whole = partition.batch_sharding(mesh), partition.replicated(mesh)

        def array(*shape, place=split, dtype=a.dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        batch = a.rows * len(devices)
        u, dt = array(batch, a.length, a.inner), array(batch, a.length, a.inner, dtype=jnp.float32)
        B, segments = array(batch, a.length, a.state), array(batch, a.length, dtype=jnp.int32)
        A, D = array(a.inner, a.state, place=whole, dtype=jnp.float32), array(a.inner, place=whole)
        for implementation in a.implementations:
            forward = functools.partial(forward_pass, implementation)
            backward = functools.partial(both_passes, implementation)
            gradients = (split, split, whole, split, split, whole)
            for kind, function, inputs, places in (
                ("forward", forward, (segments, u, dt, A, B, B, D), split),
                ("forward + backward", backward, (segments, u, dt, A, B, B, D, u), (split, gradients)),
            ):
                lowered = jax.jit(partition.on_mesh(mesh, function), out_shardings=places).lower(*inputs)
                begin = time.perf_counter()
                memory = lowered.compile().memory_analysis()
                seconds = time.perf_counter() - begin
                assert memory is not None
                outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
                ratio = memory.temp_size_in_bytes / outside
                print(
                    f"{topology:<11}{implementation:<13}{kind:<20}{outside / 1e6:>9.1f}"
                    f"{memory.temp_size_in_bytes / 1e6:>11.1f}{ratio:>7.2f}{seconds:>11.1f}",
                    flush=True,
                )


def forward_pass(implementation, segment_ids_BL, *inputs):
    return scan.selective_scan(*inputs, segment_ids_BL=segment_ids_BL, implementation=implementation)[0]


def both_passes(implementation, segment_ids_BL, *inputs):
    *inputs, dy_BLI = inputs
    y_BLI, pull_back = jax.vjp(functools.partial(forward_pass, implementation, segment_ids_BL), *inputs)
    return y_BLI, pull_back(dy_BLI)


if __name__ == "__main__":
    main()
