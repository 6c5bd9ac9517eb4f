"""A run small enough for a test: a MoE-Mamba of a few thousand parameters on text that the test writes.

Also a config file for the command line: `--config=tests/tiny.py:FOLDER`.
"""

import pathlib
import random

import jax
from flax import nnx

from moejax import config
from moejax.models import lm

WORDS = "the a river stone wind over under runs falls light dark and of in cold small old".split()


def write_corpus(folder: pathlib.Path, num_documents: int = 60) -> pathlib.Path:
    """Documents of a few words that follow one another with some order, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(num_documents):
        start = rng.randrange(len(WORDS))
        words = [WORDS[(start + 3 * j + rng.randrange(2)) % len(WORDS)] for j in range(rng.randrange(6, 40))]
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + f" {i}.")
    return folder


def model(model_config: config.ModelConfig, seed: int = 0) -> lm.Lm:
    """A new model; made under jit, which is ten times quicker than op by op."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda: lm.Lm(model_config, rngs=nnx.Rngs(params=seed)), compiler_options=options)()


def get_config(folder: str) -> config.Config:
    """A tiny MoE-Mamba on the texts in `folder`."""
    c = config.Config()
    c.model.vocab_size = 260
    c.model.d_model = 16
    c.model.num_periods = 2
    c.model.mamba.chunk_size = 2  # less to compile
    c.model.mamba.d_state = 4
    c.model.moe.num_experts = 4
    c.model.moe.d_expert = 16
    c.data.source = f"files:{folder}"
    c.data.tokenizer = "bytes"
    c.data.seq_length = 32
    c.data.batch_size = 8
    c.data.validation_fraction = 0.1
    c.optimizer.learning_rate = 1e-2
    c.optimizer.warmup_steps = 2
    c.training.num_steps = 8
    c.training.eval_every = 4
    c.checkpoint.every = 3
    c.mesh.data = 1
    c.mesh.fsdp = -1  # one device unless a test asks for more
    return c
