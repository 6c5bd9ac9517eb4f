"""What a run starts from where it has no checkpoint of its own: drawn parameters, or those of another run."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from moejax import config as config_lib
from moejax.config import plain
from moejax.data import pipeline, tokenizers
from moejax.models import model as model_lib
from moejax.training import checkpoint, folder, metrics, tables
from moejax.training import state as state_lib

# What a model may change when it starts from another run's parameters: how it is computed, regularised and drawn, and
# what its routers drop and are trained with. Anything else would make other parameters, or the same mean other things;
# or would have no effect, as relu_coefficient: what it has become is among what routers keep.
_FREE = (
    *(path for path in folder.FREE_ON_RESUME if path.startswith("model.")),
    *("model.dropout", "model.remat", "model.compute_dtype"),
    *("model.init", "model.init_scale", "model.embedding_std", "model.rescale_out_proj"),
    *(f"model.{mamba}.{bound}" for mamba in ("mamba", "mamba2") for bound in ("dt_min", "dt_max")),
    *("model.moe.capacity_", "model.moe.eval_capacity_factor", "model.moe.min_capacity", "model.moe.group_size"),
    *("model.moe.dispatch", "model.moe.router_dtype", "model.moe.layer_reduction", "model.moe.expert_dropout"),
    *("model.moe.exploration", "model.moe.jitter", "model.moe.router_dropout", "model.moe.second_threshold"),
    *("model.moe.noise_epsilon", "model.moe.bias_rate", "model.moe.relu_multiplier"),
    *(f"model.moe.{loss}_weight" for loss in config_lib.MOE_LOSSES),
)
# Token ids mean what that run's tokenizer made of them, which this run reads from its folder: where the other found a
# vocabulary does not matter.
_SAME_DATA = ("data.tokenizer", "data.vocab_size", "data.end_of_text")


def check(config: config_lib.Config) -> None:
    """Refuses what `create` could not do; reads only.

    Raises:
      ConfigError: training.init_from is no run, or one of another model or tokenizer, in one line with all that
        differs; or without it, the table of a hash router can't be read.
    """
    if not config.training.init_from:
        tables.read(config)
        return
    other = _config(config)
    wrong = [
        (path, old, new)
        for path, old, new in plain.differences(other, config)
        if (path.startswith("model.") and not path.startswith(_FREE))
        or (path in _SAME_DATA and (path != "data.tokenizer" or _kind(old) != _kind(new)))
    ]
    if wrong:
        here = " and ".join(f"{path}={new}" for path, _, new in wrong)
        there = " and ".join(f"{path}={old}" for path, old, _ in wrong)
        raise config_lib.ConfigError(
            f"{here}, but training.init_from={config.training.init_from} has {there}; make them the same"
        )
    if not folder.has_checkpoints(_folder(config)):
        raise _no_checkpoint(config)


def tokenizer(config: config_lib.Config, workdir: pathlib.Path) -> tokenizers.Tokenizer | None:
    """The one that the run in workdir has saved, else that of training.init_from; None: neither is there."""
    found = folder.load_tokenizer(workdir)
    return found if found or not config.training.init_from else folder.load_tokenizer(_folder(config))


def create(config: config_lib.Config, mesh: Mesh, data: pipeline.Data) -> state_lib.TrainState:
    """A state at step 0, with the optimizer's state new.

    Its model is drawn; or all of it, what routers keep beside their weights too, is that of the newest sound checkpoint
    of training.init_from, whatever optimizer that was made with.
    """
    if config.training.init_from:
        model = _read(config, mesh)  # before the new state is there: its moments are gone by then
        return dataclasses.replace(state_lib.create(config, mesh), model=model)
    state = state_lib.create(config, mesh)
    table_V = tables.read(config)
    tables.fill(state.model, tables.balanced(config, data) if table_V is None else table_V)
    return state


def _read(config: config_lib.Config, mesh: Mesh) -> model_lib.Model:
    saved = dataclasses.replace(config, optimizer=_config(config).optimizer)  # this run's model, that one's moments
    checkpoints = checkpoint.Checkpoints(_folder(config) / "checkpoints", config.checkpoint, read_only=True)
    try:
        restored = checkpoints.restore(
            state_lib.abstract(saved, mesh), on_corrupt=folder.report_corrupt(_folder(config))
        )
    finally:
        checkpoints.close()
    if restored is None:
        raise _no_checkpoint(config)
    state, step = restored
    metrics.say(f"starting from the parameters of step {step} of {config.training.init_from}")
    return state.model


def _kind(tokenizer: str) -> str:
    return tokenizer.partition(":")[0]


def _folder(config: config_lib.Config) -> pathlib.Path:
    try:
        return pathlib.Path(config.training.init_from).expanduser()
    except RuntimeError:
        raise config_lib.ConfigError(
            f"training.init_from={config.training.init_from} begins with the home of a user that there is not; "
            "write the path of a folder"
        ) from None


def _config(config: config_lib.Config) -> config_lib.Config:
    return folder.load_config(_folder(config), "training.init_from")


def _no_checkpoint(config: config_lib.Config) -> config_lib.ConfigError:
    return config_lib.ConfigError(
        f"training.init_from={config.training.init_from} holds no checkpoint; name the folder of a run that has one"
    )
