"""T5 and Switch Transformers have the parameters of their papers and released checkpoints; FLOPs are the compiler's."""

import jax
import pytest

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import flops, params, plan
from moejax.training import state


def layers(first, sparse, every):
    """Sublayers of a period: every layer sparse, or the second of two, or none."""
    if not sparse:
        return (*first, "mlp")
    return (*first, "moe") if every == 1 else (*first, "mlp", *first, "moe")


def model(depth, width, d_ff, heads, *, experts=0, every=2, activation="relu", tied=True):
    """T5 of so many layers a stack; with experts in every so many layers."""
    per_period = every if experts else 1
    config = config_lib.ModelConfig(
        vocab_size=32_128,
        d_model=width,
        encoder_period=layers(("attention",), experts, every),
        num_encoder_periods=depth // per_period,
        period=layers(("attention", "cross_attention"), experts, every),
        num_periods=depth // per_period,
        tie_embeddings=tied,
    )
    config.attention = config_lib.AttentionConfig(num_heads=heads, d_head=64, position="relative")
    config.mlp = config_lib.MlpConfig(d_ff=d_ff, activation=activation)
    config.moe = config_lib.MoeConfig(
        router="switch", num_experts=max(experts, 1), d_expert=d_ff, activation=activation
    )
    return config


BASE, LARGE = (12, 768, 3072, 12), (24, 1024, 4096, 16)
XXL = {"activation": "geglu", "tied": False}


@pytest.mark.parametrize(
    ("config", "expected", "rounding"),
    [
        (model(*BASE), 222.9e6, 0.05e6),
        (model(*BASE, experts=8), 0.619e9, 0.0005e9),
        (model(*BASE, experts=16), 1.07e9, 0.005e9),
        (model(*BASE, experts=32), 1.98e9, 0.005e9),
        (model(*BASE, experts=64), 3.79e9, 0.005e9),
        (model(*BASE, experts=128), 7.415e9, 0.0005e9),
        (model(*BASE, experts=256), 14.66e9, 0.005e9),
        (model(*LARGE), 737.5e6, 0.2e6),
        (model(*LARGE, experts=128), 26.3e9, 0.05e9),
        (model(24, 4096, 10_240, 64, experts=128, **XXL), 394.7e9, 0.05e9),
        (model(15, 2080, 6144, 32, experts=2048, every=1, tied=False), 1571.3e9, 0.5e9),
        (model(15, 2080, 6144, 30, experts=2048, every=1, tied=False), 1571.3e9, 0.5e9),
    ],
    ids=["base", "8", "16", "32", "64", "128", "256", "large", "large 128", "xxl", "c", "c of 30 heads"],
)
def test_totals_are_those_of_the_papers_within_the_rounding_printed(config, expected, rounding):
    """T5 1.0 Base and Large, Switch-Base, -Large, -XXL and -C (arXiv 2101.03961 and its released configs)."""
    assert params.count(config)["total"] == pytest.approx(expected, abs=rounding)


def test_the_parts_of_t5_base_are_as_worked_by_hand():
    """Attention has 4 matrices of 768 x 768, a stack one table of 32 x 12; a norm is before each branch and last."""
    counts = {name: part["total"] for name, part in params.count(model(*BASE))["components"].items() if part["total"]}
    assert counts == {
        "embedding": 32_128 * 768,
        "norm": (12 * 2 + 12 * 3 + 2) * 768,
        "attention": (12 + 24) * 4 * 768**2 + 2 * 32 * 12,
        "mlp": 24 * 2 * 768 * 3072,
    }


def test_the_closed_form_is_what_the_compiler_makes_of_an_encoder_decoders_step():
    """Two lengths, cross attention, heads of a width of their own, groups of two rows, empty slots, recomputation.

    Of one period alone the compiler computes keys and values of the memory once: here are two.
    """
    c = config_lib.Config()
    c.model = model(2, 16, 20, 3, experts=3, every=1)
    c.model.vocab_size, c.model.remat, c.model.attention.d_head = 357, "period", 4
    c.model.moe.group_size = 64
    c.data.objective, c.data.tokenizer, c.data.seq_length, c.data.batch_size = "span_corruption", "bytes", 32, 4
    mesh = partition.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    gradients = jax.jit(partition.on_mesh(mesh, state.make_gradients(c, mesh)))
    program = plan.program_lib.parse(gradients.lower(*plan.abstract_arguments(c, mesh)).compile().as_text())
    assert plan.cost.count(program).matmul_flops == pytest.approx(flops.training_step(c).executed, rel=0.01)
