"""Laws of Adafactor: every matrix of a stack is updated as if it were alone, and the state is small and in place."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moejax import config as config_lib
from moejax import partition, rules
from moejax.models import model as model_lib
from moejax.training import adafactor, checkpoint, optimizer, state

D, H, F, E, X, V = 12, 2, 20, 4, 10, 260  # model, heads, feed-forward, experts, expert, vocabulary

# Of each parameter, by branch and name: the dims over its matrices, and the shape of one; without the dim over periods.
MATRICES = {
    "embedding": ((), (V, D)),
    "norm scale": ((), (D,)),
    "attention qkv": ((0,), (D, D)),
    "attention out": ((), (D, D)),
    "mlp up": ((1,), (D, F)),
    "mlp up_bias": ((0,), (F,)),
    "mlp down": ((), (F, D)),
    "mlp down_bias": ((), (D,)),
    "moe up": ((0, 2), (D, X)),
    "moe up_bias": ((0, 1), (X,)),
    "moe down": ((0,), (X, D)),
    "moe down_bias": ((0,), (D,)),
    "moe weight": ((), (D, E)),
}
PERIOD = ("attention", "mlp", "moe")


@pytest.fixture
def config() -> config_lib.Config:
    c = tiny.get_config("unused")
    c.model.d_model, c.model.attention.num_heads = D, H
    c.model.prefix, c.model.period, c.model.num_periods = ("mlp",), PERIOD, 2
    c.model.mlp = config_lib.MlpConfig(d_ff=F, activation="swiglu", bias=True)
    c.model.moe = config_lib.MoeConfig(num_experts=E, d_expert=X, activation="geglu", bias=True)
    c.optimizer = config_lib.OptimizerConfig(
        name="adafactor", learning_rate=0.3, schedule="inverse_sqrt", warmup_steps=2, weight_decay=0.0, clip_norm=0.0
    )
    c.optimizer.adafactor.min_factored_dim = 10  # factors all matrices but the router's
    rules.validate(c)
    return c


def matrices(path: str, array) -> np.ndarray:
    """The matrices (or vectors) of a parameter one after another, [N, ...]; see `put_back`."""
    stacks, shape = form(path)
    return np.moveaxis(np.asarray(array, np.float64), stacks, range(len(stacks))).reshape(-1, *shape)


def put_back(path: str, found: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    stacks = form(path)[0]
    moved = np.moveaxis(np.empty(shape), stacks, range(len(stacks))).shape
    return np.moveaxis(found.reshape(moved), range(len(stacks)), stacks)


def form(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims of a parameter over its matrices, and the shape of one."""
    name = path.split("/")[-2]
    place = re.search(r"(prefix|blocks)/(\d)/branches", path)
    if place:
        name = f"{'mlp' if place[1] == 'prefix' else PERIOD[int(place[2])]} {name}"
    stacks, shape = MATRICES["norm scale" if name == "scale" else name]
    return ((0, *(dim + 1 for dim in stacks)), shape) if path.startswith("periods") else (stacks, shape)


def by_path(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def draw(model, seed: int, scale: float = 1.0):
    """Numbers in the place of the model's; each of its rows has a size of its own."""
    rng = np.random.default_rng(seed)

    def of(leaf):
        size = scale * np.exp(rng.normal(size=(*leaf.shape[:-1], 1)))
        return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(of, model)


def start(config):
    model = draw(model_lib.abstract(config.model), 0)
    model.norm.scale[...] = jnp.zeros(D)  # its scale is the least there is
    return model


def small(config):
    """One stack of experts: less to compile."""
    config.model.prefix, config.model.period, config.model.num_periods = (), ("moe",), 1


GRADIENT_SCALES = (1.0, 0.01, 30.0)  # the last one is clipped


def train(config, num_steps: int = 3):
    """Path -> parameter, before and after each update."""
    tx, model = optimizer.build(config), start(config)
    opt_state, update, models = tx.init(model), jax.jit(tx.update), [by_path(model)]
    for step in range(num_steps):
        updates, opt_state = update(draw(model, step + 1, GRADIENT_SCALES[step]), opt_state, model)
        model = jax.tree.map(jnp.add, model, updates)
        models.append(by_path(model))
    return models


class Numpy:
    """Adafactor of one matrix or vector: algorithms 4 and 5 of arXiv 1804.04235 with T5X's constants."""

    def __init__(self, weight, *, smallest: int):
        self.weight, self.is_factored = weight, weight.ndim == 2 and min(weight.shape) >= smallest
        self.rows = self.columns = self.squares = 0.0
        self.was_clipped = False

    def step(self, gradient, step: int, rate: float, decay: float = 0.0):
        kept, square = 1 - step**-0.8, gradient**2 + 1e-30
        self.squares = kept * self.squares + (1 - kept) * square
        if self.is_factored:
            self.rows = kept * self.rows + (1 - kept) * square.mean(axis=1)
            self.columns = kept * self.columns + (1 - kept) * square.mean(axis=0)
            mean = np.outer(self.rows, self.columns) / self.rows.mean()
        else:
            mean = self.squares
        direction = gradient / np.sqrt(mean)
        size = np.sqrt((direction**2).mean())
        self.was_clipped |= size > 1.001
        scale = max(1e-3, np.sqrt((self.weight**2).mean()))
        self.weight = self.weight - rate * (scale * direction / max(1.0, size) + decay * self.weight)


def test_every_matrix_of_a_stack_is_updated_as_in_numpy_alone(config):
    config.optimizer.weight_decay = 0.1
    models = train(config)
    decayed = by_path(optimizer.decay_mask(model_lib.abstract(config.model), "matrices"))
    alone = {path: [Numpy(w, smallest=10) for w in matrices(path, leaf)] for path, leaf in models[0].items()}
    for step, scale in enumerate(GRADIENT_SCALES):
        gradients = by_path(draw(model_lib.abstract(config.model), step + 1, scale))
        rate = 0.3 / math.sqrt(max(step, 2))
        for path, found in models[step + 1].items():
            for one, gradient in zip(alone[path], matrices(path, gradients[path]), strict=True):
                one.step(gradient, step + 1, rate, 0.1 * bool(decayed[path]))
            expected = put_back(path, np.stack([one.weight for one in alone[path]]), found.shape)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5, err_msg=f"{path}, step {step}")
    every = [one for ones in alone.values() for one in ones]
    assert any(one.was_clipped for one in every)
    assert len([one for one in every if one.is_factored]) == 1 + 3 + 2 * (3 + 1 + 3 + 3 * E)  # written out by hand


@pytest.mark.parity
def test_updates_equal_those_of_hugging_faces_adafactor_on_unstacked_parameters(config):
    import torch
    from transformers.optimization import Adafactor

    config.optimizer.schedule, config.optimizer.learning_rate, config.optimizer.warmup_steps = "constant", 0.1, 0
    config.optimizer.adafactor.min_factored_dim = 1  # it factors all matrices
    models = train(config)
    alone = {
        path: [torch.nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in matrices(path, leaf)]
        for path, leaf in models[0].items()
    }
    theirs = Adafactor([w for ws in alone.values() for w in ws], lr=0.1, relative_step=False, scale_parameter=True)
    for step, scale in enumerate(GRADIENT_SCALES):
        gradients = by_path(draw(model_lib.abstract(config.model), step + 1, scale))
        for path, weights in alone.items():
            for weight, gradient in zip(weights, matrices(path, gradients[path]), strict=True):
                weight.grad = torch.tensor(gradient, dtype=torch.float32)
        theirs.step()
        for path, found in models[step + 1].items():
            expected = put_back(path, np.stack([w.detach().numpy() for w in alone[path]]), found.shape)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5, err_msg=f"{path}, step {step}")


def test_without_its_two_bounds_an_update_is_the_gradient_over_its_root_mean_square(config):
    small(config)
    config.optimizer.adafactor = config_lib.AdafactorConfig(clip_rms=0.0, scale_by_parameter=False)
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 0
    models = train(config, 1)  # no dim of 128: nothing is factored, and the first mean is the square itself
    signs = {path: np.sign(leaf) for path, leaf in by_path(draw(model_lib.abstract(config.model), 1)).items()}
    for path, found in models[1].items():
        np.testing.assert_allclose(found, models[0][path] - 0.3 * signs[path], rtol=1e-4, atol=1e-5)


def test_the_state_of_a_factored_matrix_is_a_row_a_column_and_one_number(config):
    opt_state = jax.eval_shape(optimizer.build(config).init, model_lib.abstract(config.model))
    sizes: dict[str, int] = {}
    for path, leaf in by_path(opt_state[1][0]._replace(count=None)).items():
        parameter = path.partition("/")[2]
        sizes[parameter] = sizes.get(parameter, 0) + leaf.size
    for path, leaf in by_path(model_lib.abstract(config.model)).items():
        shape = form(path)[1]
        is_factored = len(shape) == 2 and min(shape) >= 10
        per_matrix = sum(shape) + 1 if is_factored else math.prod(shape) + 2
        assert sizes.pop(path) == leaf.size // math.prod(shape) * per_matrix, path
    assert not sizes


AXES = {"fsdp": 2, "expert": 2, "tensor": 2}


def mesh_of_eight(config):
    config.mesh = config_lib.MeshConfig(data=1, **AXES)
    return partition.make_mesh(config.mesh, jax.devices()[:8])


def test_statistics_lie_where_their_parameter_lies(config):
    """An axis of the mesh splits of a parameter's statistics what it splits of the parameter."""
    places = by_path(state.shardings(config, mesh_of_eight(config)).opt_state)
    specs = {re.sub(r"^1/\d/(v_row|v_col|v)/", r"\1 ", path): place.spec for path, place in places.items()}
    spec = jax.sharding.PartitionSpec
    inner = "periods/blocks/{}/branches/0/{}/value"
    assert specs["v_row " + inner.format(2, "up")] == spec(None, "expert", None, "tensor")  # 10 of the 12 x 10
    assert specs["v_col " + inner.format(2, "up")] == spec(None, "expert", None, "fsdp")
    assert specs["v " + inner.format(2, "up_bias")] == spec(None, "expert", None, "tensor")
    assert specs["v_col " + inner.format(1, "up")] == spec(None, None, "tensor")
    assert specs["v_row " + inner.format(0, "qkv")] == spec(None, None, "fsdp")
    assert specs["v_col " + inner.format(0, "qkv")] == spec(None, None, "tensor")
    assert specs["v " + inner.format(2, "router/weight")] == spec(None, "fsdp", None)


def test_a_mesh_changes_no_update(config):
    small(config)
    mesh, tx, model = mesh_of_eight(config), optimizer.build(config), start(config)
    places = partition.tree_shardings((model, tx.init(model)), mesh)
    update = jax.jit(tx.update, in_shardings=(places[0], places[1], places[0]), out_shardings=places)
    given = draw(model, 1), tx.init(model), model
    found = update(*jax.device_put(given, (places[0], places[1], places[0])))
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(tx.update)(*given)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_the_state_comes_back_from_a_checkpoint(tmp_path, config):
    small(config)
    mesh = partition.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
    abstract = state.abstract(config, mesh)
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda leaf: jnp.asarray(9 * rng.normal(size=leaf.shape), leaf.dtype), abstract)
    checkpoints = checkpoint.Checkpoints(tmp_path / "c", config.checkpoint)
    checkpoints.save(jax.device_put(whole, jax.tree.map(lambda leaf: leaf.sharding, abstract)), 3)
    checkpoints.wait()
    elsewhere = state.abstract(config, mesh_of_eight(config))
    restored, step = checkpoints.restore(elsewhere, on_corrupt=lambda *_: pytest.fail("damaged"))
    checkpoints.close()
    assert step == 3
    assert jax.tree.structure(restored) == jax.tree.structure(whole)
    for ours, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_every_parameter_of_every_branch_has_a_layout():
    c = config_lib.ModelConfig(period=("attention", "cross_attention", "mlp", "moe"), num_periods=1)
    c.encoder_period, c.num_encoder_periods, c.attention.position = ("attention", "mlp"), 1, "relative"
    decoders = set(config_lib.BRANCHES) - {"cross_attention"}
    d = config_lib.ModelConfig(period=tuple(decoders), num_periods=1, num_softmaxes=2, tie_embeddings=False)
    d.mamba.moe_projections = config_lib.MAMBA_PROJECTIONS
    for config, router in ((c, "top_k"), (d, "noisy_top_k"), (d, "soft_moe")):  # no other has other parameters
        config.moe = config_lib.MoeConfig(router=router, num_shared_experts=1, activation="swiglu", slots_per_expert=2)
        variables = jax.tree.leaves(model_lib.abstract(config), is_leaf=partition.is_variable)
        for variable in variables:
            layout = adafactor.layout(variable)
            sizes = [variable.shape[dim] for dim in layout.stacks]
            assert math.prod(sizes) * math.prod(layout.shape) == math.prod(variable.shape)


def test_axes_that_no_table_names_are_refused():
    with pytest.raises(ValueError, match=r"\('a', 'b', 'c'\) of a parameter give matrices of 3 dims"):
        adafactor.layout(nnx.Param(jnp.zeros((2, 3, 4)), axes=("a", "b", "c")))


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("optimizer.name", "sgd", "optimizer.name=sgd is not known; choose one of adamw, adafactor"),
        ("optimizer.beta1", 0.95, "optimizer.beta1=0.95 has no effect with optimizer.name=adafactor; leave it at 0.9"),
        ("optimizer.eps", 1e-6, "optimizer.eps=1e-06 has no effect with optimizer.name=adafactor"),
        ("optimizer.adafactor.min_factored_dim", 0, "min_factored_dim=0 must be 1 or more"),
        ("optimizer.adafactor.min_scale", 0.0, "min_scale=0.0 must be positive"),
        ("optimizer.adafactor.decay_rate", 0.0, "decay_rate=0.0 must be positive"),
        ("optimizer.adafactor.clip_rms", -1.0, "clip_rms=-1.0 must be 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(config, path, value, line):
    rules.checks.put(config, path, value)
    with pytest.raises(config_lib.ConfigError, match=line):
        rules.validate(config)


def test_fields_of_adafactor_are_refused_where_adamw_would_not_read_them():
    c = config_lib.Config()
    c.optimizer.adafactor.clip_rms = 0.1
    with pytest.raises(config_lib.ConfigError, match=r"clip_rms=0\.1 has no effect with optimizer\.name=adamw"):
        rules.validate(c)
