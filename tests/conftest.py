"""Eight virtual CPU devices, and downloads and trained tokenizers in a folder of this test run."""

import gc
import os

# Before anything imports jax, which reads them once. Tests compile far more than they run, and XLA's CPU compiler takes
# six times longer with its fusion emitters and optimiser, and a tenth longer where it splits small programs to compile
# the parts at once. Flags that are already set come last, and win.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tracing makes many objects and little garbage, and each of Python's many looks for cycles among them is a twentieth of
# a test's time.
gc.set_threshold(20_000, 20, 20)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest files first, so that processes that share them end together."""
    longest = "test_cli.py", "test_verify.py"
    items.sort(key=lambda item: item.path.parent.name != "training" and item.path.name not in longest)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def slope():
    """d/ds f(x + s d) at s = 0 of a float64 function of an array, by central differences: what gradients must give."""

    def central(function, x, direction, eps=1e-6):
        x, direction = np.asarray(x, np.float64), np.asarray(direction, np.float64)
        return (function(x + eps * direction) - function(x - eps * direction)) / (2 * eps)

    return central


@pytest.fixture(scope="session")
def fill():
    """make() with weights drawn by numpy instead of its own: nothing compiles, and no initial 0 or 1 hides a fault."""

    def filled(make, seed=0, scale=0.5):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(make)
        return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)

    return filled
