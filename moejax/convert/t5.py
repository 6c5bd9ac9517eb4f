"""T5 1.0, T5 1.1 and Switch Transformers from Hugging Face transformers and back, as numpy arrays.

    config = t5.config_from_hf(json.loads(pathlib.Path("config.json").read_text()), seq_length=512)
    model = t5.from_hf(hf_model.state_dict(), config)  # T5ForConditionalGeneration or its Switch relative

T5 does not divide products of queries and keys by sqrt(d_head), and is initialised with queries that are smaller by as
much; we do divide, so queries are multiplied on the way here and divided on the way back.

D model, F hidden.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moejax import config as config_lib
from moejax.convert import fields, weights
from moejax.convert import moe as moe_convert
from moejax.layers import attention, block, mlp, moe, norm
from moejax.models import encoder_decoder, stack
from moejax.models import model as model_lib

MODEL_TYPES = ("t5", "switch_transformers")
# Our gelu is the tanh form, as gelu_new; gated-gelu is that too, in transformers.
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def config_from_hf(hf: Mapping[str, Any], *, seq_length: int = 0) -> config_lib.ModelConfig:
    """The model that a Hugging Face config describes.

    Of Switch Transformers' losses: transformers adds those of the two stacks, each a mean over its tokens and layers,
    with padding; ours is the mean over all layers, without padding, so the weights are twice theirs, and stacks with
    unlike numbers of sparse layers are refused unless theirs are 0. It computes the balance loss of all layers of a
    stack at once, where ours is a mean of one a layer, and none at all where every layer is sparse.

    Args:
      hf: to_dict() of the config, or the content of config.json.
      seq_length: switch_transformers only: tokens a row of the encoder. Its expert_capacity is a number of tokens, the
        same for both stacks, ours a factor of the tokens a row: the two agree on rows of this length.

    Raises:
      ConfigError: a field is missing or out of range, or asks for what `models.encoder_decoder` cannot express.
    """
    kind = fields.field(hf, "model_type")
    if kind not in MODEL_TYPES:
        raise config_lib.ConfigError(f"model_type={kind} must be {' or '.join(MODEL_TYPES)}; convert such a model")
    tied = hf.get("tie_word_embeddings", True)
    # transformers 5 ties every T5 and says here what a 1.0 does; a config.json has the other field alone.
    scaled = tied and hf.get("scale_decoder_outputs", True)
    num_layers = fields.size(hf, "num_layers")
    num_decoder_layers = num_layers if hf.get("num_decoder_layers") is None else fields.size(hf, "num_decoder_layers")
    config = config_lib.ModelConfig(
        vocab_size=fields.size(hf, "vocab_size"),
        d_model=fields.size(hf, "d_model"),
        norm="rmsnorm",
        norm_eps=fields.positive(hf, "layer_norm_epsilon"),
        tie_embeddings=tied,
        scale_tied_logits=scaled,
        dropout=fields.share(hf, "dropout_rate"),
    )
    config.attention = config_lib.AttentionConfig(
        num_heads=fields.size(hf, "num_heads"),
        d_head=fields.size(hf, "d_kv"),
        position="relative",
        num_buckets=fields.size(hf, "relative_attention_num_buckets"),
        max_distance=fields.size(hf, "relative_attention_max_distance"),
    )
    name = "feed_forward_proj" if kind == "t5" else "dense_act_fn"
    activation = fields.field(hf, name)
    known = [one for one in _ACTIVATIONS if kind == "t5" or not one.startswith("gated")]
    if activation not in known:
        raise config_lib.ConfigError(f"{name}={activation} must be {' or '.join(known)}; convert such a model")
    config.mlp = config_lib.MlpConfig(d_ff=fields.size(hf, "d_ff"), activation=_ACTIVATIONS[activation])
    steps = {"encoder": 0, "decoder": 0}  # of how many layers one is sparse; 0: none
    if kind == "switch_transformers":
        config.moe = moe_convert.config_from_hf("switch", hf, seq_length=seq_length)
        config.moe.balance_weight *= 2
        config.moe.z_weight *= 2
        for side, count in (("encoder", num_layers), ("decoder", num_decoder_layers)):
            num_sparse = fields.field(hf, f"num_sparse_{side}_layers")
            steps[side] = count // num_sparse if num_sparse else count  # as in transformers: of 0 it makes 1
    encoder, decoder = ("attention",), ("attention", "cross_attention")
    config.encoder_period, config.num_encoder_periods = _period(encoder, num_layers, steps["encoder"], "num_layers")
    config.period, config.num_periods = _period(decoder, num_decoder_layers, steps["decoder"], "num_decoder_layers")
    _check_losses(hf, config)
    return config


def _check_losses(hf: Mapping[str, Any], config: config_lib.ModelConfig) -> None:
    """Refuses losses that no weight of a mean over the layers of both stacks gives."""
    in_encoder = config.encoder_period.count("moe") * config.num_encoder_periods
    in_decoder = config.period.count("moe") * config.num_periods
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if in_encoder != in_decoder and hf[name]:
            raise config_lib.ConfigError(
                f"{name}={hf[name]} weighs both stacks alike, and a mean over {in_encoder} sparse layers of the "
                f"encoder and {in_decoder} of the decoder does not; set it to 0, and a weight of your own in model.moe"
            )


def _period(first: tuple[str, ...], num_layers: int, step: int, name: str) -> tuple[tuple[str, ...], int]:
    """(sublayers of a period, how many): of `step` layers, the second is sparse."""
    if not step:
        return (*first, "mlp"), num_layers
    if num_layers % step:
        raise config_lib.ConfigError(
            f"{name}={num_layers} is not a multiple of {step}, of which one layer is sparse; convert a model of periods"
        )
    layers = [(*first, "moe" if step == 1 or place == 1 else "mlp") for place in range(step)]
    return sum(layers, ()), num_layers // step


def from_hf(state_dict: Mapping[str, np.ndarray], config: config_lib.ModelConfig) -> encoder_decoder.EncoderDecoder:
    """The model with these weights, float32.

    Args:
      state_dict: of the class, as numpy arrays of float32, or of a narrower float that float32 holds exactly. The
        copies of the embedding may be left out, as they are in checkpoint files.
      config: what `config_from_hf` returns, perhaps with other capacities, dropout, or weights of the losses.

    Raises:
      ConfigError: the config is not one of these models; or a tensor is missing, or of the wrong shape or dtype.
      ValueError: a tensor is unknown, or a copy of the embedding differs from it.
    """
    model = model_lib.abstract(config)
    places = _places(model)
    assert isinstance(model, encoder_decoder.EncoderDecoder)  # or it would have been refused
    parameters = weights.parameters(model)
    values = {path: np.zeros(parameter.shape, np.float32) for path, parameter in parameters.items()}
    filled = {path: np.zeros(parameter.shape, bool) for path, parameter in parameters.items()}
    for name, place in places.items():
        part = values[place.path][place.index]
        tensor = weights.tensor(state_dict, name, place.shape(part.shape))
        part[...] = place.scale * (tensor.T if place.num_inputs else tensor).reshape(part.shape)
        filled[place.path][place.index] = True
    for path, done in filled.items():
        if not done.all():
            raise config_lib.ConfigError(
                f"the model has {path}, unlike {_CLASSES}; take its config from config_from_hf"
            )
    for name in state_dict:
        if name in _COPIES or (name == "lm_head.weight" and config.tie_embeddings):
            if not np.array_equal(state_dict[name], state_dict["shared.weight"]):
                raise ValueError(
                    f"{name} differs from shared.weight, but model.tie_embeddings={config.tie_embeddings}; "
                    "set it to False for a head of its own"
                )
        elif name not in places:
            raise ValueError(f"{name} has no place in the model; leave it out")
    return weights.replace(model, values)


def to_hf(model: encoder_decoder.EncoderDecoder) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: every tensor of the class's state_dict(), so the embedding under all its names.

    A gradient with respect to a model has the model's structure and is renamed in the same way, but queries: they are
    divided by sqrt(d_head), and their gradient would have to be multiplied by it.

    Raises:
      ConfigError: the model is not one of these.
    """
    parameters = {path: np.asarray(parameter[...]) for path, parameter in weights.parameters(model).items()}
    state_dict = {}
    for name, place in _places(model).items():
        part = parameters[place.path][place.index]
        tensor = part.reshape(-1, math.prod(part.shape[place.num_inputs :])).T if place.num_inputs else part
        state_dict[name] = np.array(tensor / np.float32(place.scale), order="C")
    copies = (*_COPIES, "lm_head.weight") if model.head is None else _COPIES
    return state_dict | {name: state_dict["shared.weight"].copy() for name in copies}


_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_CLASSES = "T5ForConditionalGeneration and SwitchTransformersForConditionalGeneration"


class _Place(NamedTuple):
    """Where a tensor of theirs lies. index: into our parameter. num_inputs: the dims of that part which are inputs: a
    torch.nn.Linear keeps (out, in); 0: it is kept as it is. scale: ours over theirs."""

    path: str
    index: Any = ...
    num_inputs: int = 0
    scale: float = 1.0

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Of their tensor."""
        if not self.num_inputs:
            return ours
        return math.prod(ours[self.num_inputs :]), math.prod(ours[: self.num_inputs])


def _places(model: model_lib.Model) -> dict[str, _Place]:
    """Every tensor of theirs, but for copies of the embedding."""
    if not isinstance(model, encoder_decoder.EncoderDecoder):
        raise config_lib.ConfigError(f"the model has no encoder, unlike {_CLASSES}; set model.encoder_period")
    places = {"shared.weight": _Place("embedding")}
    if model.head is not None:
        places["lm_head.weight"] = _Place("head", num_inputs=1)
    is_switch = any(model_lib.moe_layers(model))
    for side, one in (("encoder", model.encoder), ("decoder", model.decoder)):
        if one.relative is None or not isinstance(one.norm, norm.RmsNorm) or one.periods is None:
            raise config_lib.ConfigError(
                f"the {side} is not one of {_CLASSES}; set model.attention.position=relative, model.norm=rmsnorm, "
                "model.final_norm=True, and model.prefix=() and model.suffix=()"
            )
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        places[table] = _Place(f"{side}.relative.table")
        places[f"{side}.final_layer_norm.weight"] = _Place(f"{side}.norm.scale")
        places |= _layers(side, one, is_switch)
    return places


def _layers(side: str, one: stack.Stack, is_switch: bool) -> Iterator[tuple[str, _Place]]:
    assert one.periods is not None
    sublayers = ("attention", "mlp") if side == "encoder" else ("attention", "cross_attention", "mlp")
    blocks = list(one.periods.blocks)
    if len(blocks) % len(sublayers) or len(one.prefix) or len(one.suffix):
        raise config_lib.ConfigError(
            f"the {side} is not made of layers of {', '.join(sublayers)} (or moe), as {_CLASSES} are; "
            "take its config from config_from_hf"
        )
    for period in range(one.num_periods):
        for number, layer in enumerate(blocks):
            place, kind = divmod(number, len(sublayers))
            theirs = f"{side}.block.{period * (len(blocks) // len(sublayers)) + place}.layer.{kind}"
            ours = f"{side}.periods.blocks.{number}"
            yield f"{theirs}.layer_norm.weight", _Place(f"{ours}.norm.scale", period)
            for name, inner in _sublayer(layer, sublayers[kind], is_switch):
                index = (period, *inner.index) if isinstance(inner.index, tuple) else period
                yield f"{theirs}.{name}", inner._replace(path=f"{ours}.branches.0.{inner.path}", index=index)


def _sublayer(layer: block.Block, kind: str, is_switch: bool) -> Iterator[tuple[str, _Place]]:
    """Names and places inside a sublayer; an index that is a tuple is into one period's parameter."""
    branch = layer.branches[0] if len(layer.branches) == 1 else None
    dense = "mlp" if is_switch else "DenseReluDense"
    match kind, branch:
        case "attention", attention.Attention():
            scale = math.sqrt(branch.qkv.shape[-1])
            yield "SelfAttention.q.weight", _Place("qkv", (0,), 1, scale)
            yield "SelfAttention.k.weight", _Place("qkv", (1,), 1)
            yield "SelfAttention.v.weight", _Place("qkv", (2,), 1)
            yield "SelfAttention.o.weight", _Place("out", (), 2)
        case "cross_attention", attention.CrossAttention():
            yield "EncDecAttention.q.weight", _Place("query", (), 1, math.sqrt(branch.query.shape[-1]))
            yield "EncDecAttention.k.weight", _Place("kv", (0,), 1)
            yield "EncDecAttention.v.weight", _Place("kv", (1,), 1)
            yield "EncDecAttention.o.weight", _Place("out", (), 2)
        case "mlp", mlp.Mlp() if branch.activation in ("swiglu", "geglu"):
            yield f"{dense}.wi_0.weight", _Place("up", (slice(None), 0), 1)  # the half that is activated
            yield f"{dense}.wi_1.weight", _Place("up", (slice(None), 1), 1)
            yield f"{dense}.wo.weight", _Place("down", (), 1)
        case "mlp", mlp.Mlp():
            yield f"{dense}.wi.weight", _Place("up", (), 1)
            yield f"{dense}.wo.weight", _Place("down", (), 1)
        case "mlp", moe.Moe() if branch.config.router == "switch" and not branch.config.num_shared_experts:
            yield "mlp.router.classifier.weight", _Place("router.weight", (), 1)
            for expert in range(branch.config.num_experts):
                yield f"mlp.experts.expert_{expert}.wi.weight", _Place("up", (expert,), 1)
                yield f"mlp.experts.expert_{expert}.wo.weight", _Place("down", (expert,), 1)
        case _:
            what = "several branches" if branch is None else type(branch).__name__
            raise config_lib.ConfigError(
                f"a sublayer of the model is {what} where {_CLASSES} have {kind}; take its config from config_from_hf"
            )
