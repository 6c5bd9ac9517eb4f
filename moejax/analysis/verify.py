"""Whether a batch gives the same loss, auxiliary losses, drops and gradients on every mesh, microbatch and dispatcher.

A combination is compared with one device and one microbatch: with the config's own dispatcher where that drops tokens,
else with capacity slots enough for all, the plainest way to the same numbers. All sums are float32 and differ in order
alone, so everything agrees to a few roundings. Counts agree exactly.

L layers with experts, E experts.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax import config as config_lib
from moejax import partition
from moejax.analysis import params as params_lib
from moejax.analysis import reduction
from moejax.analysis.combinations import CONFIGURED, PLAIN, Combination
from moejax.models import model as model_lib
from moejax.rules import model as model_rules
from moejax.training import state as state_lib

# Of a loss relative to itself, and of a gradient relative to its largest entry (an expert's, for experts). A rounding
# is 6e-8; sums of hundreds of terms in other orders, through a few layers, differ by 2e-6 on the models in tests.
TOLERANCE = 3e-5
# Where all of an expert's, or of a parameter's, gradient is smaller than this share of the largest of its tensor, or of
# the model, it is rounding of larger numbers that cancel.
FLOOR, MODEL_FLOOR = 1e-3, 1e-6
# Compiling is what takes the time, several times longer with XLA's fusion emitters and optimiser.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
NOISE = 0.05  # standard deviation of what is added to initial parameters, so that no 0 or 1 of theirs hides a fault


def cpu_devices(count: int) -> list[Any]:
    """So many virtual devices of the CPU, also where there is an accelerator. Call it before jax starts a back end.

    Raises:
      ConfigError: jax has started with fewer.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started
        if len(jax.devices("cpu")) < count:
            raise config_lib.ConfigError(
                f"--devices={count} is more than the {len(jax.devices('cpu'))} CPU devices that jax has started with; "
                "lower it, or call this first"
            ) from None
    return jax.devices("cpu")[:count]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a combination gives, on the host. sums: of `loss.sums`. gradients: a model that holds them."""

    sums: dict[str, Any]
    gradients: model_lib.Model

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.sums["nats"]) / max(float(self.sums["tokens"]), 1.0)

    @property
    def losses(self) -> dict[str, np.ndarray]:
        """name -> [L], without weights."""
        return {} if self.sums["moe"] is None else self.sums["moe"].losses

    @property
    def num_dropped(self) -> int:
        return 0 if self.sums["moe"] is None else int(self.sums["moe"].dropped.sum())

    @property
    def grad_norm(self) -> float:
        squares = [np.sum(np.square(parameter.value, dtype=np.float64)) for parameter in parameters(self.gradients)]
        return math.sqrt(sum(squares))

    @property
    def num_idle(self) -> int:
        """Experts, of all layers, without a token: nothing is known of their gradients."""
        return 0 if self.sums["moe"] is None else int(np.sum(self.sums["moe"].count_E == 0))


@dataclasses.dataclass
class Outcome:
    """What became of a combination.

    differences: parameter group -> the largest difference of its gradients from the reference's, relative (`compare`).
    failures: what differs too much, a line each; empty if all is well. skipped: why the config doesn't allow the
    combination, or "".
    """

    combination: Combination
    result: Result | None = None
    differences: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""


class Verifier:
    """Runs combinations of a config on virtual devices, and compares.

    config: as the user has it; decides what is allowed. small: what is run, of `reduction.reduce`.
    """

    def __init__(self, config: config_lib.Config, small: config_lib.Config, devices: Sequence[Any]):
        self.config, self.small, self.devices = config, small, list(devices)
        self._whole_model, self._small_model = model_lib.abstract(config.model), model_lib.abstract(small.model)
        self._abstract = {CONFIGURED: self._small_model}
        mesh = partition.make_mesh(Combination().mesh, self.devices[:1])
        initial = jax.device_get(state_lib.create(small, mesh).model)
        self._state = state_lib.TrainState(
            step=np.zeros((), np.int32),  # pyright: ignore[reportArgumentType]
            model=_with_noise(initial, small.training.seed),
            opt_state=None,
        )
        self._batch = reduction.batch(small)
        self._references: dict[str, Result] = {}
        self.groups = tuple(dict.fromkeys(parameter.group for parameter in parameters(self._state.model)))

    def run(self, combinations: Sequence[Combination]) -> Iterator[Outcome]:
        """The outcome of each, in order; programs are compiled ahead."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            programs = [pool.submit(self._compile, combination) for combination in combinations]
            try:
                for combination, program in zip(combinations, programs, strict=True):
                    yield self._outcome(combination, program.result)
            finally:
                pool.shutdown(cancel_futures=True)

    def reference(self, dispatcher: str = CONFIGURED) -> Result:
        """What combinations with this dispatcher must give."""
        name = PLAIN if dispatcher != CONFIGURED or self._never_drops() else CONFIGURED
        if name not in self._references:
            self._references[name] = self._compile(Combination(dispatcher=name))()
        return self._references[name]

    def _never_drops(self) -> bool:
        factor = self.small.model.moe.capacity_factor
        return any(
            factor == 0 or layer.is_dropless(factor) for layer, _ in model_lib.moe_layers(self._small_model)
        ) and self._allows(Combination(dispatcher=PLAIN))

    def _allows(self, combination: Combination) -> bool:
        try:
            self._check(combination)
        except config_lib.ConfigError:
            return False
        return True

    def _outcome(self, combination: Combination, program: Callable[[], Callable[[], Result]]) -> Outcome:
        try:
            result, reference = program()(), self.reference(combination.dispatcher)
        except config_lib.ConfigError as error:
            return Outcome(combination, skipped=str(error))
        except Exception as error:  # a router or layer of the user's may raise anything on a mesh
            what = next(iter(str(error).splitlines()), "")
            return Outcome(combination, failures=[f"raised {type(error).__name__}: {what}"])
        differences, failures = compare(result, reference)
        return Outcome(combination, result, differences, failures)

    def _check(self, combination: Combination) -> None:
        """Raises ConfigError if the config doesn't allow the combination, or what is left of it doesn't."""
        mesh = partition.make_mesh(combination.mesh, self.devices[: combination.num_devices])
        whole, small = combination.apply(self.config), combination.apply(self.small)
        whole.data.batch_size = reduction.num_rows(whole, len(self.devices))  # rows are free
        for config, model in ((whole, self._whole_model), (small, self._small_model)):
            model_rules.validate(config.model)
            partition.check_batch(config, mesh)
            partition.tree_shardings(model, mesh)
        partition.check_platform(small, mesh)

    def _compile(self, combination: Combination) -> Callable[[], Result]:
        self._check(combination)
        config = combination.apply(self.small)
        mesh = partition.make_mesh(config.mesh, self.devices[: combination.num_devices])
        gradients = state_lib.make_gradients(config, mesh)
        # the config is part of a model's structure, and the dispatcher of this one is not that of the parameters
        if combination.dispatcher not in self._abstract:
            self._abstract[combination.dispatcher] = model_lib.abstract(config.model)
        abstract = self._abstract[combination.dispatcher]
        structure = nnx.graphdef(abstract)

        def run(state: state_lib.TrainState, batch: state_lib.Batch) -> tuple[dict[str, Any], model_lib.Model]:
            _, params, routers = nnx.split(state.model, nnx.Param, ...)  # pyright: ignore[reportAssignmentType]
            model = nnx.merge(structure, params, routers)
            sums, grads = gradients(dataclasses.replace(state, model=model), batch)
            return sums, nnx.merge(structure, grads, routers)

        places = partition.tree_shardings(self._state, mesh), partition.batch_sharding(mesh)
        program = jax.jit(
            partition.on_mesh(mesh, run),
            in_shardings=places,
            out_shardings=(partition.replicated(mesh), partition.tree_shardings(abstract, mesh)),
        )
        compiled = program.lower(self._state, self._batch).compile(compiler_options=COMPILER_OPTIONS)
        return lambda: Result(*jax.device_get(compiled(*jax.device_put((self._state, self._batch), places))))


def _with_noise(model: model_lib.Model, seed: int) -> model_lib.Model:
    rng = np.random.default_rng(seed)

    def add(node: Any) -> Any:
        if not isinstance(node, nnx.Param):
            return node
        return jax.tree.map(lambda x: (x + NOISE * rng.standard_normal(x.shape)).astype(x.dtype), node)

    return jax.tree.map(add, model, is_leaf=partition.is_variable)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of a model, or its gradient: its path, its component (`params.COMPONENTS`), and the names of its dims."""

    path: str
    group: str
    dims: tuple[str, ...]
    value: np.ndarray


def parameters(model: model_lib.Model) -> Iterator[Parameter]:
    """Every parameter of a model on the host."""
    for path, variable in jax.tree_util.tree_leaves_with_path(model, is_leaf=partition.is_variable):
        if isinstance(variable, nnx.Param):
            value, axes = np.asarray(variable[...]), variable.get_metadata()["axes"]
            yield Parameter(
                path=jax.tree_util.keystr(path, simple=True, separator="."),
                group=params_lib.component(model, path),
                dims=("period",) * (value.ndim - len(axes)) + tuple(axes),
                value=value,
            )


def compare(result: Result, reference: Result) -> tuple[dict[str, float], list[str]]:
    """(differences, failures) of an `Outcome`.

    A gradient's difference is relative to the largest entry of the same parameter, period and expert: an expert with
    few tokens counts as much as one with many.
    """
    failures = [*_losses(result, reference), *_counts(result, reference)]
    differences, where = dict[str, float](), dict[str, str]()
    pairs = list(zip(parameters(result.gradients), parameters(reference.gradients), strict=True))
    model_floor = MODEL_FLOOR * max(np.abs(expected.value).max() for _, expected in pairs)
    for found, expected in pairs:
        inner = tuple(place for place, dim in enumerate(found.dims) if dim not in ("period", "expert"))
        size = np.abs(expected.value).max(axis=inner, keepdims=True)
        size = np.maximum(size, max(FLOOR * size.max(), model_floor))
        relative = np.abs(found.value.astype(np.float64) - expected.value).max(axis=inner, keepdims=True) / size
        worst = np.unravel_index(np.argmax(relative), relative.shape)  # a NaN counts as the largest
        largest = differences.get(found.group, -1.0)
        if not (np.isnan(largest) or relative[worst] <= largest):
            differences[found.group] = float(relative[worst])
            places = [f"{dim} {n}" for dim, n in zip(found.dims, worst, strict=True) if dim in ("period", "expert")]
            where[found.group] = ", ".join([found.path, *places])
    failures += [
        f"gradient of {group} ({where[group]}) is off by {difference:.1e} of its largest entry"
        for group, difference in differences.items()
        if not difference <= TOLERANCE
    ]
    return differences, failures


def _losses(result: Result, reference: Result) -> Iterator[str]:
    """A line for each loss that differs."""
    pairs = [("loss", result.loss, reference.loss)]
    for name, value_L in result.losses.items():
        for layer, value in enumerate(value_L):
            pairs.append((f"{name} loss of MoE layer {layer}", float(value), float(reference.losses[name][layer])))
    for name, value, expected in pairs:
        if not abs(value - expected) <= TOLERANCE * abs(expected):
            yield f"{name} is {value:.7g} where the reference has {expected:.7g}"


def _counts(result: Result, reference: Result) -> Iterator[str]:
    """A line for each statistic of routing that differs; whole numbers must be the same."""
    if reference.sums["moe"] is None:
        return
    for field, name in (
        ("count_E", "choices"),
        ("dropped", "drops"),
        ("together_EE", "pairs of choices"),
        ("entropy", "router entropy"),
    ):
        found_L, expected_L = getattr(result.sums["moe"], field), getattr(reference.sums["moe"], field)
        if expected_L is None:
            continue
        for layer, (found, expected) in enumerate(zip(found_L, expected_L, strict=True)):
            is_whole = np.issubdtype(expected.dtype, np.integer)
            slack = 0.0 if is_whole else TOLERANCE * np.abs(expected).max()
            if not np.all(np.abs(found - expected) <= slack):
                wrong = np.unravel_index(np.argmax(np.abs(found - expected)), np.shape(found))
                of = "".join(f" of expert {n}" for n in wrong)
                yield (
                    f"{name}{of} in MoE layer {layer}: {found[wrong]:.7g} where the reference has {expected[wrong]:.7g}"
                )
