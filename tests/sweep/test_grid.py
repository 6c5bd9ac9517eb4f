"""Laws of grids: which points they make, under which names, and what stays equal across them."""

import copy
import subprocess
import sys

import closed_form
import pytest

from moejax import config as config_lib
from moejax.sweep import cost, grid, solve

E, K, F, D = "model.moe.num_experts", "model.moe.top_k", "model.moe.d_expert", "model.d_model"
MAMBA = {"model.period": ("mamba",), "model.num_periods": 2}


@pytest.fixture
def base():
    """One layer, quick to count, of experts that are wide enough to be solved for."""
    c = config_lib.Config()
    c.model.d_model, c.model.vocab_size, c.data.vocab_size = 16, 300, 300
    c.model.period, c.model.num_periods = ("moe",), 1
    c.model.moe.num_experts, c.model.moe.d_expert = 4, 240
    c.data.seq_length, c.data.batch_size, c.training.num_steps = 8, 2, 1000
    return c


def active(point):
    return cost.parameters(point.config.model)["non_embedding_active"]


def total(point):
    return cost.parameters(point.config.model)["non_embedding_total"]


def test_a_product_is_every_combination_and_a_zip_pairs_by_hand(base):
    a, b = grid.over(E, 4, 8), grid.over(K, 1, 2)
    rows = grid.product(a, b)
    assert [(row.name, row.settings) for row in rows] == [
        ("e4_k1", {E: 4, K: 1}),
        ("e4_k2", {E: 4, K: 2}),
        ("e8_k1", {E: 8, K: 1}),
        ("e8_k2", {E: 8, K: 2}),
    ]
    assert [row.name for row in grid.zipped(a, b)] == ["e4_k1", "e8_k2"]
    points = grid.points(grid.Sweep(base, [*rows, *grid.named("mamba", MAMBA)], seeds=(0, 3), baseline="mamba"))
    assert [point.name for point in points] == [
        f"{group}_s{seed}" for group in ("e4_k1", "e4_k2", "e8_k1", "e8_k2", "mamba") for seed in (0, 3)
    ]
    last, first = points[-1], points[0]
    assert (last.group, last.seed, last.settings) == ("mamba", 3, {"model.period": ["mamba"], "model.num_periods": 2})
    assert last.config.training.seed == last.config.data.seed == 3
    assert first.settings == {K: 1}  # the base has 4 experts
    assert (base.model.moe.num_experts, base.training.seed, base.data.seed) == (4, 0, 42)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        (E, 32, "e32"), ("model.moe.router", "noisy_top_k", "noisy-top-k"), ("data.batch_size", 64, "b64"),
        ("model.period", ("mamba", "moe"), "mamba-moe"), ("model.period", ("mamba|moe",), "mamba+moe"),
        ("optimizer.learning_rate", 3e-4, "lr0.0003"),
        ("model.mamba.expand", 0.6666666, "mamba.expand0.6666666"), ("model.moe.capacity_factor", 2.0, "c2"),
        ("model.mamba2.d_state", 64, "mamba2.d_state64"), ("optimizer.weight_decay", 0.1, "weight_decay0.1"),
        ("model.tie_embeddings", False, "tie_embeddings-False"), ("model.suffix", (), "suffix-none"),
        ("data.source", "files:/a b/*.txt", "source-files-a-b-.txt"),
    ],
)  # fmt: skip
def test_a_name_is_a_word_for_each_setting(field, value, name):
    assert grid.over(field, value)[0].name == name


def test_numbers_that_differ_have_names_that_differ():
    names = {row.name for row in grid.over("optimizer.learning_rate", 0.1, 0.1000001, 1e-7, 1)}
    assert len(names) == 4


def test_axes_are_those_of_the_experts_and_0_without(base):
    soft = grid.named("soft", {"model.moe.router": "soft"})
    rows = [*grid.named("mamba", MAMBA), *grid.over(E, 8), *grid.granularity(2), *soft]
    axes = [grid.axes(point) for point in grid.points(grid.Sweep(base, rows))]
    assert axes == [
        {"experts": 0, "granularity": 0, "top_k": 0},
        {"experts": 8, "granularity": 1, "top_k": 1},
        {"experts": 8, "granularity": 2, "top_k": 2},
        {"experts": 4, "granularity": 1, "top_k": 4},
    ]


def test_granularity_splits_every_expert_and_keeps_the_parameters_but_for_the_router(base):
    base.model.moe.num_shared_experts = 1
    points = grid.points(grid.Sweep(base, grid.product(grid.over(E, 2, 4), grid.granularity(1, 4))))
    moes = {point.group: point.config.model.moe for point in points}
    sizes = {name: (m.num_experts, m.d_expert, m.top_k, m.num_shared_experts) for name, m in moes.items()}
    assert sizes == {"e2_g1": (2, 240, 0, 1), "e2_g4": (8, 60, 4, 4), "e4_g1": (4, 240, 0, 1), "e4_g4": (16, 60, 4, 4)}
    coarse, fine = points[2], points[3]
    assert active(fine) - active(coarse) == total(fine) - total(coarse) == 16 * (16 - 4)
    with pytest.raises(config_lib.ConfigError, match=r"^point g7: granularity=7 does not divide .*d_expert=240;"):
        grid.points(grid.Sweep(base, grid.granularity(7)))


def test_iso_active_solves_for_the_width_of_experts_as_the_closed_form_does(base):
    points = grid.points(grid.Sweep(base, grid.iso_active(grid.over(E, 1, 8, 64))))
    target = closed_form.parameters(16, 4, 240)
    for point, num_experts in zip(points, (1, 8, 64), strict=True):
        width = 240 + (4 - num_experts) // 2  # a router's column has d_model weights, a hidden unit twice as many
        assert point.settings == {E: num_experts, F: width}
        assert active(point) == closed_form.parameters(16, num_experts, width)
        assert abs(active(point) / target - 1) < 0.0021  # half a unit


def test_iso_active_solves_for_top_k_and_for_shared_experts(base):
    narrower = grid.over(F, 120, 80)
    for field, sizes in ((K, [(2, 0), (3, 0)]), ("model.moe.num_shared_experts", [(0, 1), (0, 2)])):
        points = grid.points(grid.Sweep(base, grid.iso_active(narrower, solve=field)))
        moes = [point.config.model.moe for point in points]
        assert [(moe.top_k, moe.num_shared_experts) for moe in moes] == sizes
        assert {active(point) for point in points} == {closed_form.parameters(16, 4, 240)}


def test_iso_total_solves_for_the_number_of_experts_or_their_width(base):
    target = closed_form.parameters(16, 4, 240, counted=4)
    more = grid.points(grid.Sweep(base, grid.iso_total(grid.over(F, 120, 60), solve=E)))
    assert [point.config.model.moe.num_experts for point in more] == [8, 16]
    wider = grid.points(grid.Sweep(base, grid.iso_total(grid.over(E, 2, 8))))
    for point in (*more, *wider):
        moe = point.config.model.moe
        assert total(point) == closed_form.parameters(16, moe.num_experts, moe.d_expert, counted=moe.num_experts)
        assert abs(total(point) / target - 1) < 0.01


def test_iso_flops_solves_for_the_steps(base):
    points = grid.points(grid.Sweep(base, grid.iso_flops(grid.product(grid.over(D, 8, 32), grid.over(E, 2)))))
    target = closed_form.flops(16, 4, 240, vocab=300, tokens=1000 * 16)
    for point, width in zip(points, (8, 32), strict=True):
        step = closed_form.flops(width, 2, 240, vocab=300, tokens=16)
        assert point.config.training.num_steps == round(target / step)
        assert cost.flops(point.config) == point.config.training.num_steps * step
        assert abs(cost.flops(point.config) / target - 1) < 0.01


def test_only_what_a_constraint_is_given_varies_under_it(base):
    rows = grid.product(grid.over(D, 16, 32), grid.iso_active(grid.over(E, 16)))
    assert [row.name for row in rows] == ["d16_e16", "d32_e16"]
    for point in grid.points(grid.Sweep(base, rows)):
        target = closed_form.parameters(point.config.model.d_model, 4, 240)
        assert abs(active(point) / target - 1) < 0.0021


def test_constraints_that_move_each_others_fields_hold_together(base):
    rows = grid.iso_flops(grid.iso_active(grid.iso_total(grid.over(K, 2), solve=E)))
    targets = (active, closed_form.parameters(16, 4, 240)), (total, closed_form.parameters(16, 4, 240, counted=4))
    (point,) = grid.points(grid.Sweep(base, rows))
    assert point.config.model.moe.num_experts == 8  # first 4, then the experts become narrower
    for measure, target in targets:
        assert abs(measure(point) / target - 1) <= 0.01
    assert abs(cost.flops(point.config) / closed_form.flops(16, 4, 240, vocab=300, tokens=16_000) - 1) <= 0.01


def test_what_is_held_may_be_that_of_other_settings_and_a_multiple_may_be_asked_for(base):
    rows = grid.iso_active(grid.over(E, 2, 8), like=MAMBA | {"model.num_periods": 3}, multiple_of=4)
    points = grid.points(grid.Sweep(base, rows))
    target = 3 * (closed_form.mamba(16) + 16) + 16
    for point in points:
        assert point.config.model.moe.d_expert % 4 == 0
        assert abs(active(point) / target - 1) < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: grid.over("model.moe.num_expert", 4),
            "model.moe.num_expert is not a field of the config; did you mean model.moe.num_experts?",
        ),
        (
            lambda: grid.over("model.moe", 4),
            "model.moe is a group of fields; set one of them, e.g. model.moe.router",
        ),
        (
            lambda: grid.over("data.seed", 4),
            "data.seed is what the seeds of a sweep set; write Sweep(seeds=(0, 1, 2))",
        ),
        (lambda: grid.over(E), "over('model.moe.num_experts') has no values; give some"),
        (
            lambda: grid.named("a/b", {}),
            "named('a/b') can't name a folder; write letters, digits and . + _ = - and begin with a letter or digit",
        ),
        (lambda: grid.granularity(0.5), "granularity=0.5 must be a whole number from 1; change it"),
        (
            lambda: grid.product(grid.over(E, 4), grid.over(E, 8)),
            "model.moe.num_experts is in two grids of a product or zip; leave one out",
        ),
        (
            lambda: grid.product(grid.iso_active(grid.over(E, 4)), grid.iso_total(grid.over(K, 2))),
            "model.moe.d_expert is solved for by two grids of a product or zip; leave one out",
        ),
        (
            lambda: grid.zipped(grid.over(E, 4, 8), grid.over(K, 1)),
            "zipped() was given grids of 1 and 2 rows; give equally many",
        ),
        (
            lambda: grid.iso_active(grid.over(F, 4)),
            "iso_active(solve=model.moe.d_expert) of f4, which sets it already; solve for another field",
        ),
        (
            lambda: grid.iso_total(grid.over(E, 4), solve="model.mamba.expand"),
            "iso_total(solve=model.mamba.expand) must name a whole number, as model.moe.d_expert; change it",
        ),
    ],
)
def test_grids_that_cannot_be_are_refused_in_one_line(make, message):
    with pytest.raises(config_lib.ConfigError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the grid of get_sweep() has no rows; give it some"),
        (
            [grid.over(E, 4), *grid.named("mamba", MAMBA)],
            {},
            "the grid of get_sweep() holds what is no row; join grids with +, as in over(...) + named(...)",
        ),
        (grid.over(E, 4), {"seeds": 5}, "seeds=5 must be a tuple of whole numbers; write seeds=(0, 1, 2)"),
        (grid.over(E, 4), {"seeds": ("0",)}, "seeds=('0',) must be a tuple of whole numbers; write seeds=(0, 1, 2)"),
        (grid.over(E, 4), {"seeds": (1, 1)}, "seeds=(1, 1) must differ; change them"),
        (grid.over(E, 4), {"baseline": "mamba"}, "baseline=mamba is no point of the sweep; choose one of e4"),
        (
            [*grid.over(E, 4), *grid.named("E4", MAMBA)],
            {},
            "two points are named E4: model.moe.num_experts=4 and model.period=('mamba',), model.num_periods=2; "
            "leave one out, or use named()",
        ),
        (grid.over(E, "4"), {}, "point e-4: model.moe.num_experts='4' must be of type int; change it"),
        (
            grid.over(K, 5),
            {},
            "point k5: model.moe.top_k=5 is more than model.moe.num_experts=4; set top_k to 4 or less",
        ),
        (
            grid.iso_active(grid.over(E, 1024)),
            {},
            "point e1024: model.moe.d_expert=1 gives 16,448 active parameters, 111.5% more than the 7,776 to hold, and "
            "no other comes nearer (1% is allowed); vary model.moe.num_experts less, or solve for another field",
        ),
        (
            grid.iso_active(grid.over(F, 150), solve=K),
            {},
            "point f150: model.moe.top_k=2 gives 9,696 active parameters, 24.7% more than the 7,776 to hold, and no "
            "other comes nearer (1% is allowed); vary model.moe.d_expert less, or solve for another field",
        ),
        (
            grid.iso_active(grid.over(E, 8), multiple_of=200),
            {},
            "point e8: model.moe.d_expert=200 gives 6,560 active parameters, 15.6% fewer than the 7,776 to hold, and "
            "no other multiple of 200 comes nearer (1% is allowed); vary model.moe.num_experts less, or solve for "
            "another field",
        ),
        (
            grid.iso_active(grid.named("mamba", MAMBA)),
            {},
            "point mamba: model.moe.d_expert does not change the number of active parameters; take the point out of "
            "iso_active(), or solve for another field",
        ),
        (
            grid.iso_active(grid.over("model.period", ("mambo",))),
            {},
            "point mambo: model.period=mambo is not known; choose one of mamba, mamba2, mamba_moe, attention, "
            "cross_attention, mlp, moe",
        ),
    ],
)
def test_sweeps_that_cannot_be_are_refused_in_one_line_that_names_the_point(base, rows, options, message):
    with pytest.raises(config_lib.ConfigError) as error:
        grid.points(grid.Sweep(base, rows, **options))
    assert str(error.value) == message


def test_every_measure_has_a_constraint():
    made = {f"iso_{measure}" for measure in solve.MEASURES}
    assert made == {name for name in vars(grid) if name.startswith("iso_")}


def test_declaring_a_sweep_imports_no_jax():
    program = "import sys, moejax.sweep.grid; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_row_from_a_config_is_that_config(base):
    other = copy.deepcopy(base)
    other.model.period, other.optimizer.learning_rate = ("mamba", "mlp"), 0.5
    [point] = grid.points(grid.Sweep(base, grid.from_config("other", other, base), seeds=(base.training.seed,)))
    assert point.settings == {"model.period": ["mamba", "mlp"], "optimizer.learning_rate": 0.5}
    other.data.seed = other.training.seed
    assert point.config == other
