"""The report: its numbers against loops over the same rows, and a page that stands alone."""

import copy
import html.parser
import json
import math
import pathlib
import re
import statistics

import numpy as np
import pytest

from moejax import config
from moejax.analysis import figures, report

NUM_LAYERS, NUM_EXPERTS = 2, 4
ATTACK = "<script>alert(1)</script>"
BASELINES = {"uniform": 8.3178, "unigram": 6.41, "bigram": 4.43}


def make_rows(num_steps: int, *, moe: bool = True, validate_every: int = 10) -> list[dict]:
    rng = np.random.default_rng(num_steps)
    rows = []
    for step in range(1, num_steps + 1):
        loss = 4.0 + 4.0 * math.exp(-step / 10) + 0.1 * rng.normal()
        row = {
            "step": step,
            "tokens": 1000 * step - step % 7,
            "loss": loss,
            "ema_loss": loss + 0.05,
            "learning_rate": 1e-3 / step,
            "grad_norm": 30.0 / step,
            "tokens_per_second": float(rng.uniform(1900, 2100)),
            "seconds": 1.5,
        }
        if moe:
            load = rng.dirichlet(np.full(NUM_EXPERTS, 20.0), NUM_LAYERS)
            row |= {
                "balance_loss": float(NUM_EXPERTS * (load**2).sum(1).mean()),
                "load": load.tolist(),
                "dropped": [0.25 / step] * NUM_LAYERS,
                "router_entropy": [1.2, 1.3],
            }
        if step % validate_every == 0:
            row["validation_loss"] = loss + 0.02
        rows.append(row)
    return rows


def make_run(
    folder: pathlib.Path, rows: list[dict], *, evaluation: bool = True, samples: tuple[dict, ...] = (), seed: int = 0
) -> pathlib.Path:
    settings = config.Config()
    settings.training.seed = seed
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(settings)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation:
        result = {
            "step": rows[-1]["step"],
            "loss": 3.912,
            "perplexity": math.exp(3.912),
            "bits_per_byte": 1.534,
            "tokens": 61234,
            "documents": 501,
            "baselines": BASELINES,
        }
        (folder / "eval.json").write_text(json.dumps(result))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


class Page(html.parser.HTMLParser):
    """The page's ids, references, visible text, and what a browser would fetch."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._pieces: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name in ("href", "xlink:href", "src", "srcset", "data"):
                if (value or "").startswith("#"):
                    self.references.add((value or "")[1:])
                elif not (value or "").startswith("data:"):
                    self.fetched.append(value or "")

    def handle_data(self, data):
        self._pieces.append(data)


@pytest.fixture
def run_folder(tmp_path) -> pathlib.Path:
    return make_run(tmp_path / "moe_mamba_25m", make_rows(60))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """The page of one run; drawing takes a second, so the tests that only look share it."""
    folder = tmp_path_factory.mktemp("report") / "moe_mamba_25m"
    samples = tuple({"step": step, "prompt": "<b>x", "text": f"{ATTACK} of {step}"} for step in (10, 20, 30))
    return report.write([make_run(folder, make_rows(60), samples=samples)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> pathlib.Path:
    """The page of two runs; the second has no eval.json, and ends with two experts without load."""
    folder = tmp_path_factory.mktemp("report")
    fast = make_run(folder / "fast", make_rows(30))
    rows = make_rows(40)
    for row in rows[36:]:
        row["load"][1] = [0.5, 0.5, 0.0, 0.0]
    slow = make_run(folder / "slow", rows, evaluation=False, seed=7)
    return report.write([fast, slow], folder / "both.html")


def first_result(output: pathlib.Path) -> dict:
    return json.loads(output.with_suffix(".json").read_text())["runs"][0]


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_fetches_nothing(written):
    page = Page(written)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert not re.findall(r"https?://", page.source)
    assert page.tags.count("svg") == 8  # loss, three of training, load, dropped, entropy, balance


def test_svg_ids_are_unique_and_every_reference_has_its_target(compared):
    page = Page(compared)
    assert page.tags.count("svg") == 4 + 2 * 4
    assert len(page.references) > 10
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)


def test_headline_numbers_are_those_of_the_json(written):
    page, result = Page(written), first_result(written)
    assert written.name == "report.html"
    assert result == report.numbers(written.parent)
    assert (
        "After 60 steps and 59,996 tokens the validation loss is 3.912 nats/token (1.534 bits per byte), " in page.text
    )
    assert "0.518 below the bigram baseline." in page.text
    assert f"training loss (average) {result['training_loss']:.3f}" in page.text
    assert f"perplexity {result['validation']['perplexity']:.2f}" in page.text
    assert f"tokens/s (median) {result['tokens_per_second']:,.0f}" in page.text
    assert "wall time of the steps 1 min 30 s" in page.text
    assert f"bigram 4.430 {math.exp(4.43):.2f} −0.518" in page.text
    assert "every one of the 8 experts has load." in page.text


def test_the_last_samples_are_shown_as_text(written):
    page = Page(written)
    assert f"<b>x {ATTACK} of 20" in page.text
    assert f"<b>x {ATTACK} of 30" in page.text
    assert f"{ATTACK} of 10" not in page.text


def test_a_name_is_text_whatever_its_characters(tmp_path):
    names = ("<i>$a$ & _b", "_c")
    page = Page(report.write([make_run(tmp_path / name, make_rows(3, moe=False)) for name in names]))
    assert "i" not in page.tags
    # in the table of results, the legends of four figures, and the settings
    assert all(page.text.count(name) >= 6 for name in names)


def test_the_same_run_gives_the_same_bytes(written, tmp_path):
    assert report.write([written.parent], tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_nothing_but_the_page_and_its_numbers_is_left_behind(written):
    inputs = {"config.json", "metrics.jsonl", "eval.json", "samples.jsonl"}
    assert {path.name for path in written.parent.iterdir()} == inputs | {"report.html", "report.json"}


def test_several_runs_are_compared(compared):
    page, folders = Page(compared), [compared.parent / name for name in ("fast", "slow")]
    numbers = [report.numbers(folder) for folder in folders]
    assert json.loads(compared.with_suffix(".json").read_text()) == {"runs": numbers}
    slow = make_rows(40)[-1]["validation_loss"]
    assert f"validation loss 3.912 {slow:.3f}" in page.text
    assert "less bigram −0.518 –" in page.text
    assert "The runs differ in: field fast slow training.seed 0 7 All" in page.text
    assert "Routing: fast" in page.text
    assert "Routing: slow" in page.text
    # slow has no bits per byte, so the runs are compared in nats
    loss, name = min((3.912, "fast"), (slow, "slow"))
    assert f"Of 2 runs, {name} has the lowest validation loss: {loss:.3f} nats/token." in page.text


def test_runs_of_different_tokenizers_are_compared_by_byte(tmp_path):
    folders = [make_run(tmp_path / name, make_rows(3, moe=False)) for name in ("bpe", "bytes")]
    result = json.loads((folders[1] / "eval.json").read_text())
    result |= {"loss": 1.2, "bits_per_byte": 1.731, "baselines": {"uniform": 5.5, "bigram": 2.4}}
    (folders[1] / "eval.json").write_text(json.dumps(result))
    page = Page(report.write(folders))
    assert "bpe has the lowest validation loss: 1.534 bits per byte." in page.text
    assert "bigram 4.43" not in page.text  # one run's baseline is no line to hold the other against


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for parent in "ab":
        (tmp_path / parent).mkdir()
    folders = [make_run(tmp_path / parent / "run", make_rows(3, moe=False)) for parent in "ab"]
    page = Page(report.write(folders))
    assert f"{folders[0]} {folders[1]} steps 3 3" in page.text
    assert "The runs have the same settings." in page.text


# --- runs that lack something ----------------------------------------------------------------------------------------


def test_a_model_without_moe_has_no_routing(tmp_path):
    output = report.write([make_run(tmp_path / "dense", make_rows(30, moe=False))])
    page = Page(output)
    assert first_result(output)["routing"] is None
    assert "Routing" not in page.text
    assert "Expert load" not in page.text
    assert page.tags.count("svg") == 4


@pytest.mark.parametrize("moe", [True, False])
def test_a_run_of_one_step(tmp_path, moe):
    rows = make_rows(1, moe=moe)
    output = report.write([make_run(tmp_path / "one", rows, evaluation=False)])
    page, result = Page(output), first_result(output)
    assert result["validation"] is None
    assert result["baselines"] == {}
    assert result["training_loss"] == rows[0]["ema_loss"]
    loss = f"{rows[0]['ema_loss']:.3f}"
    assert f"After 1 steps and 999 tokens the average training loss is {loss} nats/token; the run has not" in page.text


def test_a_run_without_eval_json_shows_the_last_validation_of_its_metrics(tmp_path):
    rows = make_rows(25, moe=False)
    output = report.write([make_run(tmp_path / "run", rows, evaluation=False)])
    loss = rows[19]["validation_loss"]
    expected = {"step": 20, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": None}
    assert first_result(output)["validation"] == expected | {"tokens": None, "documents": None}
    page = Page(output)
    assert f"After 25 steps and 24,996 tokens the validation loss (of step 20) is {loss:.3f} nats/token." in page.text
    assert "Beside the baselines" not in page.text


def test_a_validation_after_eval_json_counts(tmp_path):
    rows = make_rows(40)
    folder = make_run(tmp_path / "run", rows[:20])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = report.numbers(folder)
    assert (result["validation"]["step"], result["validation"]["loss"]) == (40, rows[-1]["validation_loss"])
    assert result["baselines"]["bigram"]["difference"] == rows[-1]["validation_loss"] - BASELINES["bigram"]


@pytest.mark.parametrize("half", [b'{"step": 61, "tok', b'{"step": 61, "text": "\xc3'])
def test_a_half_written_last_line_is_ignored(run_folder, half):
    expected, metrics = report.numbers(run_folder), run_folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + half)
    assert report.numbers(run_folder) == expected


def test_a_whole_last_line_counts_without_its_newline(run_folder):
    metrics = run_folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps(make_rows(61)[-1]))
    assert report.numbers(run_folder)["steps"] == 61


def test_a_step_run_again_after_a_kill_counts_once(tmp_path):
    rows = make_rows(30)
    lost = [row | {"tokens": -1, "loss": 99.0, "seconds": 1000.0} for row in copy.deepcopy(rows[20:25])]
    folder = make_run(tmp_path / "run", rows[:20] + lost + rows[20:])
    assert report.numbers(folder) == report.numbers(make_run(tmp_path / "whole", rows)) | {"name": "run"}


def test_losses_that_are_not_finite_are_told(tmp_path):
    rows = make_rows(30)
    for row in rows[20:]:
        row |= {"loss": None, "ema_loss": None, "grad_norm": None, "balance_loss": None}
        row |= {"load": [[None] * NUM_EXPERTS] * NUM_LAYERS, "router_entropy": [None] * NUM_LAYERS}
    output = report.write([make_run(tmp_path / "run", rows, evaluation=False)])
    result = first_result(output)
    assert result["training_loss"] is None
    assert result["steps_without_finite_loss"] == 10
    assert result["routing"]["min_load"] is None
    page = Page(output)
    assert "The loss was not finite in 10 of the steps." in page.text
    assert "the expert load was not finite" in page.text


def test_a_run_that_was_never_finite_has_a_page(tmp_path):
    rows = [row | {"loss": None, "ema_loss": None, "grad_norm": None} for row in make_rows(5, moe=False)]
    assert "svg" in Page(report.write([make_run(tmp_path / "run", rows, evaluation=False)])).tags


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_equal_a_loop_over_the_rows(tmp_path):
    rows = make_rows(57)
    result = report.numbers(make_run(tmp_path / "run", rows))
    assert (result["steps"], result["tokens"]) == (57, rows[-1]["tokens"])
    assert result["seconds"] == pytest.approx(57 * 1.5)
    assert result["tokens_per_second"] == statistics.median(row["tokens_per_second"] for row in rows)
    assert result["baselines"]["unigram"] == {
        "loss": 6.41,
        "perplexity": pytest.approx(math.exp(6.41)),
        "difference": pytest.approx(3.912 - 6.41),
    }

    window = [row for row in rows if row["step"] > 51]  # a tenth of 57, rounded up: 6 steps
    loads = []
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            loads.append(NUM_EXPERTS * sum(row["load"][layer][expert] for row in window) / len(window))
    routing = result["routing"]
    assert (routing["first_step"], routing["last_step"]) == (52, 57)
    assert (routing["num_layers"], routing["num_experts"]) == (NUM_LAYERS, NUM_EXPERTS)
    assert routing["min_load"] == pytest.approx(min(loads))
    assert routing["max_load"] == pytest.approx(max(loads))
    assert routing["experts_without_load"] == []
    assert routing["balance_loss"] == pytest.approx(statistics.mean(row["balance_loss"] for row in window))
    assert routing["dropped"] == pytest.approx([statistics.mean(row["dropped"][0] for row in window)] * NUM_LAYERS)
    assert routing["router_entropy"] == pytest.approx([1.2, 1.3])


def test_an_expert_without_load_at_the_end_is_named(compared):
    routing = report.numbers(compared.parent / "slow")["routing"]
    assert (routing["experts_without_load"], routing["max_load"]) == ([[1, 2], [1, 3]], 2.0)
    text = Page(compared).text
    assert "(37 to 40) the least loaded expert had 0.00 and the most loaded 2.00 times the balanced share" in text
    assert "2 of 8 experts had no load at all: layer 1 expert 2, layer 1 expert 3." in text


@pytest.mark.parametrize(("first", "num_steps", "max_bins"), [(1, 7, 200), (1, 600, 200), (11, 250, 200), (5, 1, 3)])
def test_a_bin_is_the_mean_of_its_steps(first, num_steps, max_bins):
    steps_S = np.arange(first, first + num_steps)
    values_SLE = np.random.default_rng(0).normal(size=(num_steps, NUM_LAYERS, NUM_EXPERTS))
    values_SLE[0, 0, 0] = np.nan
    middle_N, mean_NLE = figures.bin_means(steps_S, values_SLE, max_bins)

    num_bins = min(max_bins, num_steps)
    width = num_steps / num_bins
    assert mean_NLE.shape == (num_bins, NUM_LAYERS, NUM_EXPERTS)
    for index in range(num_bins):
        inside = [s for s in range(num_steps) if index * num_steps <= s * num_bins < (index + 1) * num_steps]
        assert abs(len(inside) - width) < 1
        for layer in range(NUM_LAYERS):
            for expert in range(NUM_EXPERTS):
                values = [values_SLE[s, layer, expert] for s in inside if not math.isnan(values_SLE[s, layer, expert])]
                expected = sum(values) / len(values) if values else math.nan
                assert mean_NLE[index, layer, expert] == pytest.approx(expected, nan_ok=True)
        assert middle_N[index] == pytest.approx(first - 0.5 + (index + 0.5) * width)


def test_a_bin_without_a_step_is_nan():
    middle_N, mean_N = figures.bin_means(np.array([1, 2, 9, 10]), np.array([1.0, 3.0, 5.0, 7.0]), max_bins=5)
    np.testing.assert_array_equal(mean_N, [2.0, np.nan, np.nan, np.nan, 6.0])
    np.testing.assert_array_equal(middle_N, [1.5, 3.5, 5.5, 7.5, 9.5])


# --- figures ---------------------------------------------------------------------------------------------------------


def loss_curves(loss_S: np.ndarray) -> figures.LossCurves:
    missing_S = np.full(len(loss_S), np.nan)
    return figures.LossCurves(
        name="run", steps_S=np.arange(len(loss_S)) + 1, loss_S=loss_S, ema_S=loss_S, validation_S=missing_S
    )


def test_a_baseline_beyond_the_scale_is_told_in_the_caption_and_not_drawn():
    low = figures.loss("loss", [loss_curves(np.linspace(4.2, 4.0, 50))], {"uniform": 8.32, "bigram": 4.43})
    assert "Off the scale: uniform (8.32)." in low.caption
    assert "bigram 4.43" in low.svg
    assert "uniform 8.32" not in low.svg
    high = figures.loss("loss", [loss_curves(np.linspace(9.0, 4.0, 50))], {"uniform": 8.32, "bigram": 4.43})
    assert "Off the scale" not in high.caption
    assert "uniform 8.32" in high.svg


def test_a_spike_does_not_set_the_scale_and_is_told():
    loss_S = np.linspace(4.2, 4.0, 50)
    loss_S[3] = 80.0
    assert "Some steps lie above the scale, up to 80.00." in figures.loss("loss", [loss_curves(loss_S)], {}).caption


def test_many_layers_are_dealt_to_several_figures_of_one_scale():
    load_SLE = np.random.default_rng(0).dirichlet(np.ones(16), (20, 4))
    panels = figures.load("load", np.arange(20) + 1, load_SLE)
    titles = [re.findall(r"MoE layer (\d+)", panel.svg) for panel in panels]
    assert len(panels) > 1
    assert [int(layer) for layers in titles for layer in layers] == list(range(4))
    assert panels[0].title == f"Expert load, layers 0 to {len(titles[0]) - 1}"
    # the scale of colour is drawn behind the layers
    scales = [re.findall(r">(\d+(?:\.\d+)?)<", panel.svg.rpartition("MoE layer")[2]) for panel in panels]
    assert len(scales[0]) > 2
    assert all(scale == scales[0] for scale in scales)


# --- errors ----------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[config.ConfigError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_are_no_runs_are_refused(tmp_path, run_folder):
    with pytest.raises(config.ConfigError) as error:
        report.write([tmp_path / "absent"])
    assert f"{tmp_path / 'absent'} does not exist" in one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(config.ConfigError) as error:
        report.write([run_folder, tmp_path / "empty"])
    assert one_line(error) == (
        f"{tmp_path / 'empty'} has no metrics.jsonl; name a run's folder, the --workdir of moejax train"
    )
    with pytest.raises(config.ConfigError) as error:
        report.write([])
    assert "name one or more" in one_line(error)
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "", "no complete row yet"),
        ("metrics.jsonl", '{"step": 1, "tok', "no complete row yet"),
        ("metrics.jsonl", '{"step": 1\n{"step": 2, "tokens": 1}\n', "metrics.jsonl line 1 is not JSON"),
        ("eval.json", "{", "eval.json is not JSON"),
    ],
)
def test_broken_files_are_refused(run_folder, name, text, message):
    (run_folder / name).write_text(text)
    with pytest.raises(config.ConfigError) as error:
        report.write([run_folder])
    assert message in one_line(error)


@pytest.mark.parametrize(("output", "message"), [("report.json", "must end in .html"), ("no/report.html", "make ")])
def test_an_output_that_cannot_be_written_is_refused(run_folder, tmp_path, output, message):
    with pytest.raises(config.ConfigError) as error:
        report.write([run_folder], tmp_path / output)
    assert message in one_line(error)
