"""An encoder-decoder trains on any mesh as on one device, goes on after a stop bit for bit, and is evaluated."""

import copy
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import steps
import tiny

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import generation
from moejax.analysis import run as run_lib
from moejax.data import corruption
from moejax.models import encoder_decoder
from moejax.models import model as model_lib
from moejax.training import evaluate, optimizer, state, trainer

TIMINGS = ("seconds", "tokens_per_second")


def settings(folder="unused", **mesh):
    """A Switch Transformer with all the noise there is: dropout, jitter, expert dropout."""
    c = tiny.get_config(str(folder))
    c.model = config_lib.ModelConfig(
        vocab_size=360,
        d_model=16,
        encoder_period=("attention",),
        num_encoder_periods=1,
        period=("cross_attention", "moe"),
        num_periods=1,
        dropout=0.1,
        init_scale=1.0,
    )
    c.model.attention = config_lib.AttentionConfig(num_heads=2, d_head=6, position="relative", num_buckets=8)
    c.model.moe = config_lib.MoeConfig(router="switch", num_experts=4, d_expert=16, expert_dropout=0.1)
    c.model.mlp.d_ff = 16
    c.data.objective, c.data.packing = "span_corruption", "concatenate"
    c.mesh = config_lib.MeshConfig(data=1, **mesh) if mesh else c.mesh
    return c


def test_eight_devices_give_the_losses_and_parameters_of_one():
    """With dropout in every place. 1e-5: sums in another order. (`moejax verify` compares experts on every mesh.)"""
    runs = []
    for mesh in ({}, {"fsdp": 4, "tensor": 2}):
        config = settings(**mesh)
        config.model.period = ("cross_attention", "mlp")
        runs.append(steps.run(config, 2))
    for one, other in zip(*(run.metrics for run in runs), strict=True):
        assert float(one["tokens"]) == float(other["tokens"]) > 0
        for name in ("loss", "grad_norm"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-5)
    assert float(runs[0].metrics[0]["loss"]) != float(runs[0].metrics[1]["loss"])
    for one, other in zip(*(jax.tree.leaves(run.models[0]) for run in runs), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(1, np.abs(one).max()))


def test_weights_decay_and_tables_of_relative_positions_do_not():
    mask = optimizer.decay_mask(model_lib.abstract(settings().model), "matrices")
    assert isinstance(mask, encoder_decoder.EncoderDecoder)
    assert mask.encoder.relative is not None
    assert jax.tree.leaves(mask.encoder.relative) == [False]
    decays = [jax.tree.leaves(branch) for block in mask.decoder.periods.blocks for branch in block.branches]
    assert decays == [[True] * 3, [True] * 3]  # cross attention's, and the experts' and their router's


def test_dropout_alone_is_noise():
    config = settings()
    config.model.moe.jitter = config.model.moe.expert_dropout = 0.0
    assert state._has_noise(config.model)
    config.model.dropout = 0.0
    assert not state._has_noise(config.model)


def rows(workdir):
    """metrics.jsonl without what a clock measured."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, folder) of a run of four steps, on one device; runs of this model and optimizer share its programs."""
    make_mesh, make_step, folder = partition.make_mesh, state.make_train_step, tmp_path_factory.mktemp("trained")
    compiled = {}

    def shared_step(config, mesh):
        return compiled.setdefault((config.model, config.optimizer), make_step(config, mesh))

    config = settings(tiny.write_corpus(folder / "corpus"))
    config.model.encoder_period = ("attention", "moe")
    config.training.num_steps, config.training.eval_every, config.checkpoint.every = 4, 2, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "make_mesh", lambda config, devices=None: make_mesh(config, jax.devices()[:1]))
        patch.setattr(state, "make_train_step", shared_step)
        patch.setattr(evaluate, "make_eval_step", functools.cache(evaluate.make_eval_step))
        assert trainer.train(config, folder / "run") == 4
        yield config, folder / "run"


def assert_same(model, other):
    for leaf, expected in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_a_run_goes_on_after_a_stop_bit_for_bit(trained, tmp_path):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert trainer.train(config, tmp_path / "run") == 4
    assert rows(tmp_path / "run") == rows(folder)
    assert_same(run_lib.load(tmp_path / "run").model, run_lib.load(folder).model)


def test_a_run_on_pairs_starts_from_another_s_parameters_is_evaluated(trained, tmp_path, monkeypatch):
    config, folder = copy.deepcopy(trained[0]), trained[1]
    for name, words in (("train", tiny.WORDS[:12]), ("held", tiny.WORDS[12:])):
        pairs = [json.dumps({"text": f"reverse {word}", "target": word[::-1]}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(pairs))
    config.data.target_length = corruption.row_lengths(config.data)[1]
    config.data.source, config.data.validation_source = f"files:{tmp_path}/train.jsonl", f"files:{tmp_path}/held.jsonl"
    config.data.objective, config.data.packing, config.data.target_field = "text_to_text", "pad", "target"
    config.training.init_from = str(folder)
    make_step, models = state.make_train_step, []

    def watched(config, mesh):
        step = make_step(config, mesh)

        def watched_step(before, batch):
            models.append(jax.device_get(before.model))
            return step(before, batch)

        return watched_step

    monkeypatch.setattr(state, "make_train_step", watched)
    assert trainer.train(config, tmp_path / "run") == 4
    assert_same(models[0], run_lib.load(folder).model)
    assert rows(tmp_path / "run")[-1]["loss"] < rows(tmp_path / "run")[0]["loss"]

    summary = run_lib.evaluate_run(run_lib.load(tmp_path / "run"))
    held_out = tiny.WORDS[12:]
    num_bytes, num_tokens = len("".join(held_out)), len("".join(held_out)) + len(held_out)  # an end each
    assert summary["loss"] == pytest.approx(rows(tmp_path / "run")[-1]["validation_loss"], rel=1e-6)
    assert (summary["tokens"], summary["documents"]) == (num_tokens, len(held_out))
    assert summary["bits_per_byte"] == pytest.approx(summary["loss"] * num_tokens / num_bytes / np.log(2))


def test_a_run_is_evaluated_and_counts_churn_in_both_stacks(trained):
    _, folder = trained
    done = rows(folder)
    assert done[-1]["loss"] < done[0]["loss"]
    assert len(done[-1]["churn"]) == 2  # a layer each of encoder and decoder

    run = run_lib.load(folder)
    summary = run_lib.evaluate_run(run)
    assert summary["loss"] == pytest.approx(done[-1]["validation_loss"], rel=1e-6)
    assert summary["bits_per_byte"] is None
    assert [round(sum(layer["preferred"]), 4) for layer in summary["routing"]["layers"]] == [1.0, 1.0]
    assert generation._encode(run, "a<extra_id_0>b<extra_id_99>") == [97, 356, 98, 257, 256]
    for request, expected in (
        ({"prompts": ("<extra_id_100>",)}, "number them from 0"),
        ({"prompts": ("a" * 40,), "num_tokens": 3}, "--prompt has 41 tokens, over data.seq_length, "),
        ({"prompts": ("a",), "num_tokens": 33}, "--num_tokens=33 is over 32, the longer of data"),
    ):
        with pytest.raises(config_lib.ConfigError, match=expected) as error:
            generation.write(run, generation.Request(**request))
        assert "\n" not in str(error.value)
