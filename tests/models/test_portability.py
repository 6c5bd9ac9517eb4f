"""One tiny model gives one number in both modes of NNX, and where nothing but jax and flax is installed."""

import os
import re
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from moejax import config as config_lib
from moejax.models import lm

config = config_lib.ModelConfig(vocab_size=7, d_model=8, period=("mamba", "moe"), num_periods=2)
config.mamba.d_state, config.moe.d_expert, config.remat = 2, 8, "period"
shapes = jax.eval_shape(lambda: lm.Lm(config, rngs=nnx.Rngs(params=0)))
rng = np.random.default_rng(0)
model = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)

@jax.jit
def run(model):
    def loss(model):
        logits, aux = model(jnp.arange(6)[None] % 7, train=True)
        return (logits ** 2).mean() + aux.losses["balance"].sum()
    value, gradient = jax.value_and_grad(loss)(model)
    return value, sum(abs(leaf).sum() for leaf in jax.tree.leaves(gradient))

print("numbers", *(f"{float(x):.4e}" for x in run(model)))
"""

# Every module that jax and flax do not load by themselves is refused, but for the standard library and jax's own scipy.
ONLY_JAX_AND_FLAX = """
import sys
import flax.nnx, jax, jax.numpy, numpy

class Refuse:
    known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {"moejax", "scipy"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.known or name.startswith("moejax.data"):
            raise ModuleNotFoundError(f"{name} is refused here")

for name in ("grain", "tokenizers", "tensorboardX", "matplotlib", "jinja2", "ml_collections", "tqdm", "orbax"):
    assert name not in Refuse.known, name
sys.meta_path.insert(0, Refuse())
try:
    import tqdm
    raise SystemExit("the blocker does not block")
except ModuleNotFoundError:
    pass

import importlib, pkgutil
import moejax.layers, moejax.models, moejax.ops
for package in (moejax.ops, moejax.layers, moejax.models):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""


def numbers(script, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return re.findall(r"numbers (\S+) (\S+)", result.stdout)[0]


def test_the_number_is_the_same_in_both_modes_of_nnx_and_with_only_jax_and_flax_importable():
    usual = numbers(ONLY_JAX_AND_FLAX + SCRIPT)
    as_trees = "import flax\nassert not flax.config.nnx_graph_mode\nassert not flax.config.nnx_graph_updates\n"
    assert numbers(as_trees + SCRIPT, NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false") == usual
