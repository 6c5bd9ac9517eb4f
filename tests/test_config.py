"""Laws of the config: it survives JSON, says what differs, and refuses what cannot be before anything is built."""

import json
import subprocess
import sys

import pytest

from moejax import config as config_lib
from moejax import rules
from moejax.config import plain


def test_the_defaults_are_valid():
    rules.validate(config_lib.Config())


def test_a_config_survives_json():
    c = config_lib.Config()
    c.model.prefix, c.model.moe.top_k, c.data.source, c.mesh.data = ("attention", "mlp"), 2, "files:a b,ü", 4
    again = plain.from_dict(json.loads(json.dumps(plain.to_dict(c))))
    assert again == c
    assert hash(again) == hash(c)


def test_a_missing_field_keeps_its_default_and_an_unknown_one_is_refused():
    values = plain.to_dict(config_lib.Config())
    del values["model"]["moe"]["top_k"]
    assert plain.from_dict(values) == config_lib.Config()
    values["model"]["moe"]["experts"] = 3
    with pytest.raises(config_lib.ConfigError, match=r"^model\.moe\.experts is not a field"):
        plain.from_dict(values)


def test_differences_name_the_field_and_both_values_in_order_of_declaration():
    old, new = config_lib.Config(), config_lib.Config()
    new.mesh.data, new.model.moe.num_experts = 2, 32
    assert plain.differences(old, new) == [("model.moe.num_experts", 8, 32), ("mesh.data", -1, 2)]
    assert plain.differences(old, old) == []


def test_more_states_than_a_kernel_can_hold_are_refused():
    config = config_lib.Config()
    config.model.mamba.d_state, config.model.mamba.scan = 100, "pallas_tpu"
    rules.validate(config)
    config.model.mamba.scan = "pallas_gpu"
    with pytest.raises(config_lib.ConfigError, match=r"d_state=100 is over the 64 states .* set scan=auto"):
        rules.validate(config)


def set_field(config, path, value):
    *groups, name = path.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, name, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.d_model", 0), ("model.num_periods", -1), ("model.norm", "batchnorm"), ("model.norm_eps", 0.0),
        ("model.remat", "all"), ("model.compute_dtype", "float16"), ("model.init_scale", -1.0),
        ("model.mamba.d_state", 0), ("model.mamba.expand", 0.0), ("model.mamba.dt_min", 0.0),
        ("model.mamba.dt_max", 0.0001), ("model.mamba.scan", "fast"), ("model.mamba.chunk_size", -1),
        ("model.moe.num_experts", 0), ("model.moe.top_k", -1), ("model.moe.top_k", 9), ("model.moe.d_expert", 0),
        ("model.moe.activation", "tanh"), ("model.moe.capacity_factor", -1.0),
        ("model.moe.capacity_factor", float("nan")), ("model.moe.group_size", -1),
        ("model.moe.balance_weight", float("inf")), ("model.vocab_size", 4095), ("data.tokenizer", "words"),
        ("data.vocab_size", 256), ("data.seq_length", 1), ("data.batch_size", 0), ("data.validation_fraction", 0.0),
        ("data.validation_fraction", 1.0), ("data.num_workers", -1), ("data.source", "text"), ("data.source", "files:"),
        ("data.source", "wikipedia:x"), ("data.source", ""), ("data.validation_source", "prepared"),
        ("data.tokenizer", "hf"), ("data.end_of_text", "</s>"),
        ("data.tokenizer", "bpe:x"), ("data.tokenizer", "gpt2"), ("data.packing", "tight"),
        ("data.objective", "bert"), ("data.noise_density", 1.0), ("data.mean_span_length", 0.5),
        ("data.validation_documents", -1), ("data.seed", -1),
        ("optimizer.beta1", 1.0), ("optimizer.beta2", -0.1), ("optimizer.eps", 0.0),
        ("optimizer.final_fraction", 1.5), ("optimizer.decay", "some"), ("optimizer.clip_norm", -1.0),
        ("training.num_steps", 0), ("training.num_microbatches", 3), ("training.ema_alpha", 0.0),
        ("training.eval_every", 0), ("checkpoint.every", 0), ("checkpoint.keep_last", 0), ("mesh.fsdp", 0),
        ("mesh.fsdp", -1), ("model.d_model", 256.0), ("model.period", "mamba"), ("model.period", ("mamba", 3)),
        ("model.tie_embeddings", 1), ("optimizer.learning_rate", "fast"), ("model", None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line_that_names_the_field(path, value):
    config = config_lib.Config()
    set_field(config, path, value)
    with pytest.raises(config_lib.ConfigError) as error:
        rules.validate(config)
    message = str(error.value)
    assert path.rpartition(".")[2] in message or path in message
    assert "\n" not in message
    assert ";" in message  # a remedy follows the rule


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_state", 0, "model.mamba2.d_state=0 must be 1 or more, and finite; change it"),
        ("d_conv", 0, "model.mamba2.d_conv=0 must be 1 or more, and finite; change it"),
        ("chunk_size", 0, "model.mamba2.chunk_size=0 must be 1 or more, and finite; change it"),
        ("expand", 0.0, "model.mamba2.expand=0.0 leaves no inner channel; raise it"),
        ("dt_min", 1.0, "model.mamba2.dt_min=1.0 must lie between 0.0001 and dt_max=0.1; change it"),
        ("A_min", 0.0, "model.mamba2.A_min=0.0 must be positive and at most A_max=16.0, both finite; change it"),
        ("A_max", 0.5, "model.mamba2.A_min=1.0 must be positive and at most A_max=0.5, both finite; change it"),
        ("scan", "associative", "model.mamba2.scan=associative is not known; choose one of auto, chunked, quadratic, "
         "reference"),
        ("d_head", 48, "model.mamba2.d_head=48 does not divide the inner width of 128 (expand * d_model); set it to "
         "one of 1, 2, 4, 8, 16, 32, 64, 128"),
        ("num_groups", 3, "model.mamba2.num_groups=3 does not divide the 2 heads (inner width over d_head); set it to "
         "one of 1, 2"),
    ],
)  # fmt: skip
def test_mamba2_that_cannot_be_is_refused(field, value, message):
    config = config_lib.Config()
    config.model.d_model = 64
    setattr(config.model.mamba2, field, value)
    rules.validate(config)  # no such branch in the model
    config.model.period = ("mamba2",)
    with pytest.raises(config_lib.ConfigError) as error:
        rules.validate(config)
    assert str(error.value) == message


def test_settings_of_a_branch_that_the_model_does_not_have_do_not_matter():
    config = config_lib.Config()
    config.model.attention.num_heads = 7  # does not divide 256
    rules.validate(config)
    config.model.suffix = ("attention",)
    with pytest.raises(config_lib.ConfigError, match="num_heads=7"):
        rules.validate(config)


def test_a_whole_number_in_a_float_field_is_the_same_setting():
    config = config_lib.Config()
    config.optimizer.clip_norm = 1
    rules.validate(config)
    assert config == config_lib.Config()
    assert isinstance(config.optimizer.clip_norm, float)


def test_the_config_and_its_rules_import_no_jax():
    program = "import sys, moejax.config, moejax.rules; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
