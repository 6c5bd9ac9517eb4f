"""The report: its numbers against loops over the same rows, and a page that stands alone."""

import copy
import json
import math
import pathlib
import re
import statistics

import pytest
from report_pages import ATTACK, BASELINES, NUM_EXPERTS, NUM_LAYERS, Page, first_result, make_rows, make_run

from moejax import config
from moejax.analysis import report


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


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_fetches_nothing(written):
    page = Page(written)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source
    assert not re.findall(r"https?://", page.source)
    assert page.tags.count("svg") == 10  # loss, three of training; load, imbalance, unused, dropped, entropy, balance


def test_svg_ids_are_unique_and_every_reference_has_its_target(compared):
    page = Page(compared)
    assert page.tags.count("svg") == 4 + 4 + 2 * 6
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
    balance = pytest.approx(statistics.mean(row["balance_loss"] for row in window))
    assert routing["losses"] == {"balance": balance}
    dropped = pytest.approx([statistics.mean(row["dropped"][0] for row in window)] * NUM_LAYERS)
    assert routing["layers"]["dropped"] == dropped
    assert routing["layers"]["router_entropy"] == pytest.approx([1.2, 1.3])


def test_an_expert_without_load_at_the_end_is_named(compared):
    routing = report.numbers(compared.parent / "slow")["routing"]
    assert (routing["experts_without_load"], routing["max_load"]) == ([[1, 2], [1, 3]], 2.0)
    text = Page(compared).text
    assert "(37 to 40) the least loaded expert had 0.00 and the most loaded 2.00 times the balanced share" in text
    assert "2 of 8 experts had no load at all: layer 1 expert 2, layer 1 expert 3." in text


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
