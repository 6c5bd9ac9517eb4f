"""The rules of an encoder-decoder: one line with field, value, rule and remedy for what cannot be."""

import pytest

from moejax import config as config_lib
from moejax import rules

SWITCH = {
    "encoder_period": ("attention", "mlp", "attention", "moe"),
    "num_encoder_periods": 2,
    "period": ("attention", "cross_attention", "mlp", "attention", "cross_attention", "moe"),
    "num_periods": 2,
}


def make(**settings) -> config_lib.Config:
    """A small Switch Transformer, but for these settings of the model (others by their path, a__b for a.b)."""
    config = config_lib.Config()
    config.model = config_lib.ModelConfig(**SWITCH)
    config.model.attention.position = "relative"
    config.data.objective = "span_corruption"
    for path, value in settings.items():
        *groups, name = path.split("__")
        node = config
        for group in groups or ("model",):
            node = getattr(node, group)
        setattr(node, name, value)
    return config


def refusal(**settings) -> str:
    with pytest.raises(config_lib.ConfigError) as error:
        rules.validate(make(**settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_switch_transformer_is_valid_also_with_mamba_in_its_decoder_and_groups_of_rows():
    rules.validate(make())
    rules.validate(make(period=("mamba", "cross_attention", "moe"), model__moe__group_size=512))
    assert make().model.sublayers == SWITCH["period"] * 2
    assert make().model.encoder().sublayers == SWITCH["encoder_period"] * 2
    assert not make().model.encoder().causal


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_encoder_periods": 0}, "model.num_encoder_periods=0 is half an encoder; set both"),
        ({"encoder_period": ()}, "model.num_encoder_periods=2 is half an encoder"),
        ({"encoder_period": (), "num_encoder_periods": 0}, "no encoder to look at; set model.encoder_period"),
        ({"encoder_period": ("cross_attention",)}, "is for the decoder; use attention there"),
        ({"encoder_period": ("mamba|mlp",)}, "which reads from left to right alone"),
        ({"encoder_period": ("attention", "convolution")}, "model.encoder_period=convolution is not known"),
        ({"period": ("attention", "mlp")}, "is an encoder that nothing reads; put cross_attention into model.period"),
        ({"causal": False}, "set model.causal=True"),
        ({"num_softmaxes": 2}, "model.num_softmaxes=2 is for models without an encoder; set it to 1"),
        ({"model__moe__router": "label"}, "use hash"),
        ({"model__moe__router": "expert_choice"}, "in a causal model a token's output would depend on"),
        ({"model__moe__group_size": 128}, "is not a multiple of data.seq_length=256"),
        ({"data__objective": "next_token"}, "makes an encoder-decoder, and data.objective=next_token has rows for"),
        ({"dropout": 1.0}, "model.dropout=1.0 must lie in [0, 1)"),
        ({"tie_embeddings": False, "scale_tied_logits": True}, "has no effect with model.tie_embeddings=False"),
        ({"model__attention__position": "absolute"}, "choose one of rotary, relative, none"),
        ({"model__attention__num_buckets": 30}, "must be a multiple of 4; T5 has 32"),
        ({"model__attention__max_distance": 16}, "must be over num_buckets/2=16"),
        ({"model__attention__d_head": 3, "model__attention__position": "rotary"}, "must be even for position=rotary"),
        ({"model__attention__num_heads": 7}, "must divide model.d_model=256 into heads; set it to one of 1, 2, 4"),
        ({"data__vocab_size": 356}, "must be 357 or more (256 bytes, end-of-text and 100 sentinels); raise it"),
        ({"data__tokenizer": "bytes", "vocab_size": 300}, "is below the 357 tokens of data.tokenizer=bytes"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(settings, expected):
    assert expected in refusal(**settings)


def test_a_corrupted_corpus_is_not_for_a_decoder_alone():
    config = config_lib.Config()
    config.data.objective = "span_corruption"
    with pytest.raises(config_lib.ConfigError, match="has rows for an encoder-decoder, and the model is a decoder"):
        rules.validate(config)


def test_experts_that_look_ahead_may_be_in_the_encoder_alone():
    rules.validate(make(model__moe__router="expert_choice", period=("attention", "cross_attention", "mlp")))


def test_heads_of_any_width_fit_where_their_width_is_given():
    rules.validate(make(model__attention__num_heads=7, model__attention__d_head=5))
