"""What the launchers print is what runs: their shell is run here on stand-ins for gcloud, srun and moejax."""

import os
import runpy
import subprocess
import sys

import launches
import pytest

CONFIG, SLURM, GKE, XPK, TPU_VM = launches.CONFIG, launches.SLURM, launches.GKE, launches.XPK, launches.TPU_VM


@pytest.fixture
def tools(tmp_path):
    return launches.make_tools(tmp_path)


@pytest.mark.parametrize("launcher", ["slurm", "jobset", "xpk", "tpu_vm"])
def test_values_with_spaces_quotes_and_dollars_reach_moejax_as_they_are(launcher, tools, tmp_path):
    env, train = f"--env={launches.VARIABLE[0]}={launches.VARIABLE[1]}", (CONFIG, *launches.HARD)
    match launcher:
        case "slurm":
            launches.slurm_tools(tools, tmp_path)
            script = launches.dry(*SLURM, env, "--moejax=moejax", train=train)
            done = subprocess.run(
                ["bash"], input=script, env=launches.environment(tools), capture_output=True, text=True
            )
            workdir = "/shared/a b"
        case "jobset":
            command, variables = launches.pod(launches.dry(*GKE, env, train=train), tools)
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            workdir = "/mnt/gcs/bucket/runs/a b"
        case "xpk":
            command = launches.xpk_pod(launches.dry(*XPK, env, train=train))
            done = subprocess.run(command, env=launches.environment(tools), capture_output=True, text=True)
            workdir = "/data/a b"
        case "tpu_vm":
            launches.cluster(tools, tmp_path)
            started = (*TPU_VM, "--workdir=gs://bucket/runs/a b", "--python=fake_python", env)
            done = launches.launch(*started, train=train, env=launches.environment(tools, WAIT="1"))
            launches.launch(*TPU_VM, "--stop", train=(), env=launches.environment(tools))
            workdir = "/mnt/gcs/bucket/runs/a b"
    assert done.returncode == 0, done.stderr
    expected = [["train", f"--workdir={workdir}", CONFIG, *launches.HARD], launches.VARIABLE[1]]
    assert launches.calls(tools) == [expected] * (2 if launcher == "tpu_vm" else 1)


@pytest.mark.parametrize("ref", ["main", "v1", "hash"])
def test_a_ref_is_fetched_from_git_in_place_of_what_was_there(ref, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(launches.SCRIPTS))
    import launching

    def git(*words):
        who = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
        who |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b", "PATH": os.environ["PATH"]}
        return subprocess.run(
            ["git", "-C", repository, *words], env=who, check=True, capture_output=True, text=True
        ).stdout

    repository, folder = tmp_path / "my repository", tmp_path / "src"
    repository.mkdir()
    git("init", "--quiet", "--initial-branch=main")
    (repository / "new").touch()
    git("add", "new")
    git("commit", "--quiet", "--message=one")
    git("tag", "v1")
    folder.mkdir()
    (folder / "old").touch()
    source = launching.Source(f"file://{repository}", git("rev-parse", "HEAD").strip() if ref == "hash" else ref)
    subprocess.run(["bash", "-c", source.fetch(str(folder))], check=True)
    assert sorted(path.name for path in folder.iterdir()) == [".git", "new"]


def test_slices_are_those_that_moejax_plans_for(monkeypatch):
    chips = pytest.importorskip("moejax.analysis.chips")
    monkeypatch.syspath_prepend(str(launches.SCRIPTS))
    import launching

    assert {kind: tpu.most for kind, tpu in launching.TPUS.items()} == {
        kind: chip.max_chips for kind, chip in chips.CHIPS.items()
    }
    assert {kind: 2 if tpu.cores == 1 else 3 for kind, tpu in launching.TPUS.items()} == {
        kind: chip.num_dims for kind, chip in chips.CHIPS.items()
    }
    for ours, theirs in ((launching.FLAT, chips.SHAPES_2D), (launching.SMALL_CUBES, chips.SHAPES_3D)):
        assert ours == tuple("x".join(map(str, shape)) for shape in theirs)


@pytest.mark.parametrize(
    ("arguments", "train", "words"),
    [
        ((*SLURM, "--nodes=0"), (CONFIG,), "--nodes=0 must be 1 or more"),
        ((*SLURM, "--time=soon"), (CONFIG,), "--time=soon must be like"),
        ((*SLURM, "--workdir=runs/a"), (CONFIG,), "--workdir=runs/a must be an absolute path"),
        ((*SLURM, "--sbatch=qos=high"), (CONFIG,), "write it as --option=value"),
        ((*SLURM, "--name=A_b"), (CONFIG,), "--name=A_b must be of a-z"),
        ((*SLURM, "--env=1A=b"), (CONFIG,), "--env=1A=b must be NAME=VALUE"),
        (SLURM, (), "no --config for moejax train"),
        (SLURM, ("--config", "a.py", "--workdir", "b"), "--workdir stands after --"),
        (SLURM[:-1], (CONFIG,), "required: --workdir"),
        ((*GKE, "--tpu=v9:4x4"), (CONFIG,), "KIND one of v4, v5e, v5p, v6e, tpu7x"),
        ((*GKE, "--tpu=v5e:4x4x4"), (CONFIG,), "v5e has slices of 1x1, 2x2,"),
        ((*GKE, "--tpu=v5p:4x4x6"), (CONFIG,), "multiples of 4, up to 6144 chips"),
        ((*GKE, "--tpu=v5p:8x4x4"), (CONFIG,), "A <= B <= C"),
        ((*GKE, "--tpu=v5e:2x2", "--slices=2"), (CONFIG,), "choose a larger --tpu"),
        ((*GKE, "--slices=0"), (CONFIG,), "--slices=0 must be 1 or more"),
        ((*GKE, "--name=" + "a" * 48), (CONFIG,), "has 48 characters, and at most 40 fit"),
        ((*GKE, "--workdir=/data/a"), (CONFIG,), "would go with the pod"),
        ((*GKE, "--workdir=gs://bucket"), (CONFIG,), "must be gs://BUCKET/PATH"),
        ((*GKE, "--volume=claim"), (CONFIG,), "--volume=claim must be CLAIM:/PATH"),
        ((*GKE, "--zone=z"), (CONFIG,), "--zone goes with --xpk"),
        ((*GKE, "--repository=r"), (CONFIG,), "--repository=r has no --ref"),
        ((*XPK, "--spot"), (CONFIG,), "--spot shapes the JobSet"),
        ((*XPK, "--workdir=gs://bucket/a"), (CONFIG,), "xpk storage attach"),
        ((*XPK, "--setup=a\nb"), (CONFIG,), "no newline"),
        (TPU_VM, (CONFIG,), "no --workdir"),
        ((*TPU_VM, "--workdir=/a", "--spot"), (CONFIG,), "--spot goes with --create"),
        ((*TPU_VM, "--workdir=/a", "--create=tpu7x:2x2x1"), (CONFIG,), "makes no TPU VM of this kind"),
        ((*TPU_VM, "--stop", "--status"), (), "stand alone"),
        ((*TPU_VM, "--stop"), (CONFIG,), "stand alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(arguments, train, words, monkeypatch, capsys):
    script = launches.SCRIPTS / f"launch_{arguments[0]}.py"
    monkeypatch.syspath_prepend(str(launches.SCRIPTS))
    monkeypatch.setattr(sys, "argv", [str(script), *arguments[1:], "--dry-run", *(["--", *train] if train else [])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{script.name}: ")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "tool"),
    [
        (SLURM, "sbatch"),
        (GKE, "kubectl"),
        (XPK, "xpk"),
        ((*TPU_VM, "--workdir=/a"), "gcloud"),
    ],
)
def test_a_tool_that_is_missing_is_named(arguments, tool, tmp_path):
    done = launches.launch(*arguments, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    name = f"launch_{arguments[0]}.py"
    assert done.stderr.startswith(f"{name}: {tool} is not on PATH; install it, or add --dry-run")
