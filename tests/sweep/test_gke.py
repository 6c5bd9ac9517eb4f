"""A JobSet a point: its pods train what the sweep says, by scripts/launch_gke.py and its manifest."""

import json
import pathlib
import subprocess

import job_set
import launches
import pytest
import yaml

from moejax import cli
from moejax.cli import overrides
from moejax.sweep import grid

FILE = """\
from moejax import config
from moejax.sweep import grid

def get_config():
    c = config.Config()
    c.model.d_model, c.model.num_periods, c.model.vocab_size, c.data.vocab_size = 16, 1, 300, 300
    c.model.moe.num_experts, c.model.moe.d_expert = 4, 8
    return c

def get_sweep():
    rows = [*grid.named("mamba", {"model.period": ("mamba",), "model.num_periods": 2}),
            *grid.over("optimizer.learning_rate", 1e-3, 0.5), *grid.over("data.label", "field:a b$HOME", "")]
    return grid.Sweep(get_config(), rows, seeds=(0, 7))
"""
OPTIONS = ("--tpu=v5p:4x4x4", "--image=me/moejax:1")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a sweep.py"
    path.write_text(FILE)
    return path


def arguments(file, *more, name="--name=Study", workdir="gs://bucket/runs/a b"):
    return ["sweep", f"--config={file}", f"--workdir={workdir}", "--launcher=gke", *more, "--", name, *OPTIONS]


def test_each_point_is_a_job_set_whose_pods_train_that_point(file, tmp_path, capsys):
    flags = ("--config.training.num_steps=123", "--config.data.source=files:/a b/c'd\"e$(HOSTNAME)")
    assert cli.run(arguments(file, "--dry-run", "--seeds=3", *flags)) == 0
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    points = grid.points(overrides.read_sweep(str(file), list(flags), seeds="3"))
    assert len(manifests) == len(points) == 5
    tools = launches.make_tools(tmp_path)
    for manifest, point in zip(manifests, points, strict=True):
        job_set.check(manifest)
        command, variables = launches.pod(yaml.safe_dump(manifest), tools)
        assert subprocess.run(command, env=variables, check=False).returncode == 0
        train, workdir, config, *rest = launches.calls(tools)[-1][0]
        assert (train, workdir) == ("train", f"--workdir=/mnt/gcs/bucket/runs/a b/{point.name}")
        assert overrides.read_config(config.removeprefix("--config="), rest) == point.config
    assert [manifest["metadata"]["name"] for manifest in manifests[:2]] == ["study-mamba-s3", "study-lr0-001-s3"]


def test_the_manifests_are_part_of_the_json(file, capsys):
    assert cli.run(arguments(file, "--dry-run", "--json", "--only=mamba_s7")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["points"]] == ["mamba_s7"]
    assert [yaml.safe_load(text)["metadata"]["name"] for text in printed["submits"]] == ["study-mamba-s7"]


def test_kubectl_gets_the_manifests_one_by_one_and_it_is_said_which_it_took(file, tmp_path, monkeypatch, capsys):
    tools = tmp_path / "tools"
    launches.executable(tools / "kubectl", f"#!/bin/sh\ncat > {tmp_path}/$$\n[ $(ls {tmp_path} | wc -l) -lt 5 ]\n")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert cli.run(arguments(file)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "moejax: point lr0.001_s0: kubectl create --filename=- ... ended with status 1; created befo"
    )
    assert line.endswith("created before: mamba_s0, mamba_s7")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "--spot"}, "--launcher=gke needs a --name=NAME of the sweep after --"),
        ({"name": "--name=" + "a" * 40}, "point mamba_s0: launch_gke.py: --name=aaaa"),
        ({"workdir": "runs/a"}, "point mamba_s0: launch_gke.py: --workdir=runs/a/mamba_s0 must be gs://BUCKET/PATH"),
    ],
)
def test_what_the_script_refuses_is_one_line(file, change, line, capsys):
    assert cli.run(arguments(file, "--dry-run", **change)) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert refusal.startswith(f"moejax: {line}")


@pytest.mark.parametrize("name", ["granularity.py:law", "tables.py:table_7", "experts_25m.py"])
def test_a_sweep_of_ours_goes_with_what_stands_after_its_colon(name, tmp_path, capsys):
    file = pathlib.Path(__file__).parents[2] / "configs" / "sweeps" / name
    point = grid.points(overrides.read_sweep(str(file), []))[-1]
    assert cli.run(arguments(file, "--dry-run", f"--only={point.name}", workdir="gs://bucket/runs")) == 0
    tools = launches.make_tools(tmp_path)
    command, variables = launches.pod(capsys.readouterr().out, tools)
    assert subprocess.run(command, env=variables, check=False).returncode == 0
    _, _, config, *rest = launches.calls(tools)[-1][0]
    assert overrides.read_config(config.removeprefix("--config="), rest) == point.config


def test_two_points_do_not_share_a_job_set(file, capsys):
    file.write_text(FILE.replace('grid.over("data.label"', 'grid.named("lr0-001", {}), *grid.over("data.label"'))
    assert cli.run(arguments(file, "--dry-run")) == 2
    assert "points lr0.001_s0 and lr0-001_s0 would both be the JobSet study-lr0-001-s0" in capsys.readouterr().err
