"""What the launchers print is what runs: their shell is run here on stand-ins for gcloud, srun and moejax."""

import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
CONFIG = "--config=configs/c4.py"
# Nothing may change these between the command line here and moejax there.
HARD = ("--config.data.source=files:/a b/c'd\"e$HOME$(HOSTNAME)`f`*.gz", "--config.x=$$y\\", "--config.empty=", "")
VARIABLE = ("XLA_FLAGS", "--a=1 --b='2' \"$HOME\" $(HOSTNAME) $$")

SLURM = ("slurm", "--name=a", "--nodes=2", "--gpus-per-node=8", "--time=2-12", "--workdir=/shared/a b")
GKE = ("gke", "--name=a", "--tpu=v5p:4x4x4", "--image=me/moejax:1", "--workdir=gs://bucket/runs/a b")
XPK = (*GKE[:-1], "--workdir=/data/a b", "--xpk=cluster", "--zone=z")
TPU_VM = ("tpu_vm", "--name=pod", "--zone=us-east5-a")


def launch(launcher, *arguments, train=(CONFIG,), **options):
    """A launcher as a user runs it; `train` follows the --."""
    command = [sys.executable, "-S", str(SCRIPTS / f"launch_{launcher}.py"), *arguments, "--", *train]
    return subprocess.run(command if train else command[:-1], capture_output=True, text=True, **options)


def dry(launcher, *arguments, train=(CONFIG,)) -> str:
    done = launch(launcher, *arguments, "--dry-run", train=train, env={**os.environ, "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path):
    """PATH of stand-ins. moejax notes how it was called, and with WAIT=1 trains until SIGTERM, as moejax does."""
    folder = tmp_path / "tools"
    executable(
        folder / "moejax",
        f"""\
        #!{sys.executable} -S
        import json, os, signal, sys, time
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(json.dumps([sys.argv[1:], os.environ.get("{VARIABLE[0]}")]) + "\\n")
        def stop(*_):
            print("stopped by SIGTERM after step 7, saved", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        print("training", flush=True)
        while os.environ.get("WAIT"):
            time.sleep(0.01)
        sys.exit(int(os.environ.get("STATUS", 0)))
        """,
    )
    executable(folder / "sleep", "#!/bin/sh\nexec /bin/sleep 0.02\n")
    return folder


def environment(tools, **more) -> dict[str, str]:
    return {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools.parent), "CALLS": str(tools.parent / "calls"), **more}


def calls(tools) -> list:
    path = tools.parent / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def expanded(text: str) -> str:
    """What Kubernetes makes of a command or a variable in which no $(NAME) is known (its expansion.Expand)."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else found[0], text)


def container(manifest: str) -> dict:
    pod = yaml.safe_load(manifest)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]


def pod(manifest: str, tools, **more) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the pod."""
    main = container(manifest)
    variables = {entry["name"]: expanded(entry["value"]) for entry in main["env"]}
    return [expanded(word) for word in main["command"]], environment(tools, **variables, **more)


def xpk_pod(command: str) -> list[str]:
    """How xpk runs its --command: in a subshell of the pod's shell."""
    words = shlex.split(command)
    assert words[:3] == ["xpk", "workload", "create"]
    (script,) = (word.partition("=")[2] for word in words if word.startswith("--command="))
    assert "\n" not in script  # xpk puts it into one line of YAML
    return ["bash", "-c", f"({expanded(script)}) & wait $!"]


def slurm_tools(tools, state) -> None:
    """srun runs one task; scancel sends a signal to it; scontrol notes what it is asked."""
    executable(
        tools / "srun",
        f"""\
        #!/bin/bash
        while [[ "$1" == -* ]]; do shift; done
        echo $$ > {state}/task
        exec "$@"
        """,
    )
    executable(tools / "scancel", f'#!/bin/sh\n[ "$1 $2" = "--signal=TERM 7" ] && kill -TERM $(cat {state}/task)\n')
    executable(tools / "scontrol", f'#!/bin/sh\necho "$@" > {state}/scontrol\n')


@pytest.mark.parametrize("launcher", ["slurm", "jobset", "xpk", "tpu_vm"])
def test_values_with_spaces_quotes_and_dollars_reach_moejax_as_they_are(launcher, tools, tmp_path):
    env, train = f"--env={VARIABLE[0]}={VARIABLE[1]}", (CONFIG, *HARD)
    match launcher:
        case "slurm":
            slurm_tools(tools, tmp_path)
            script = dry(*SLURM, env, "--moejax=moejax", train=train)
            done = subprocess.run(["bash"], input=script, env=environment(tools), capture_output=True, text=True)
            workdir = "/shared/a b"
        case "jobset":
            command, variables = pod(dry(*GKE, env, train=train), tools)
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            workdir = "/mnt/gcs/bucket/runs/a b"
        case "xpk":
            command = xpk_pod(dry(*XPK, env, train=train))
            done = subprocess.run(command, env=environment(tools), capture_output=True, text=True)
            workdir = "/data/a b"
        case "tpu_vm":
            cluster(tools, tmp_path)
            started = (*TPU_VM, "--workdir=gs://bucket/runs/a b", "--python=fake_python", env)
            done = launch(*started, train=train, env=environment(tools, WAIT="1"))
            launch(*TPU_VM, "--stop", train=(), env=environment(tools))
            workdir = "/mnt/gcs/bucket/runs/a b"
    assert done.returncode == 0, done.stderr
    expected = [["train", f"--workdir={workdir}", CONFIG, *HARD], VARIABLE[1]]
    assert calls(tools) == [expected] * (2 if launcher == "tpu_vm" else 1)


def test_the_batch_script_asks_slurm_for_one_process_a_gpu_that_sees_all_gpus_of_its_node():
    script = dry(*SLURM, "--gpu-type=h100", "--partition=gpu", "--sbatch=--comment=two words", "--srun=--mpi=none")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    header = [word for line in script.splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)[1:]]
    assert set(header) >= {
        *("--job-name=a", "--nodes=2", "--ntasks-per-node=8", "--gres=gpu:h100:8", "--cpus-per-task=8", "--requeue"),
        *("--time=2-12", "--signal=B:USR1@180", "--output=/shared/a b/slurm-%j.log", "--open-mode=append"),
        *("--partition=gpu", "--comment=two words"),
    }
    step = shlex.split(script[script.index("\nsrun") :].partition("&")[0])
    assert {"--gpu-bind=none", "--cpus-per-task=8", "--mpi=none"} <= set(step)
    assert not any(word.startswith(("--gpus-per-task", "--ntasks")) for word in step)


def test_a_job_near_its_limit_saves_and_queues_itself_again(tools, tmp_path):
    slurm_tools(tools, tmp_path)
    script = executable(tmp_path / "job.sh", dry(*SLURM, "--moejax=moejax"))
    variables = environment(tools, WAIT="1", SLURM_JOB_ID="7")
    output, _ = signalled([script], variables, tools, signal.SIGUSR1)  # what --signal=B:USR1@180 sends
    assert output == "training\nstopped by SIGTERM after step 7, saved\nthe time limit was near: queued again\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_has_the_status_of_moejax_and_stays_out_of_the_queue(status, tools, tmp_path):
    slurm_tools(tools, tmp_path)
    script = dry(*SLURM, "--moejax=moejax")
    assert subprocess.run(["bash"], input=script, env=environment(tools, STATUS=str(status)), text=True).returncode == (
        status
    )
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("kind", ["jobset", "xpk"])
def test_a_pod_that_is_told_to_end_saves_and_fails_so_that_the_set_starts_again(kind, tools):
    if kind == "jobset":
        command, variables = pod(dry(*GKE, "--setup=true"), tools, WAIT="1")
    else:
        command, variables = xpk_pod(dry(*XPK)), environment(tools, WAIT="1")
        command = ["bash", "-c", command[-1].replace("wait $!", "trap 'kill $!' TERM; wait $!; wait $!")]
    output, status = signalled(command, variables, tools, signal.SIGTERM)
    assert output == "training\nstopped by SIGTERM after step 7, saved\n"
    assert status == 143


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_pod_that_ends_by_itself_has_the_status_of_moejax(status, tools):
    command, variables = pod(dry(*GKE), tools, STATUS=str(status))
    assert subprocess.run(command, env=variables).returncode == status


# Fields of JobSet v1alpha2 (github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, and the rules of
# its webhook), of batch/v1's Job and core/v1's Pod. A name ends with ! where the field must be there.
NAMES = {"labels": {str: str}, "annotations": {str: str}}
VOLUME = {
    "name!": str,
    "emptyDir": {"medium": str},
    "persistentVolumeClaim": {"claimName!": str},
    "csi": {"driver!": str, "volumeAttributes": {str: str}},
}
POD = {
    "restartPolicy!": {"Never"},  # what a podFailurePolicy asks for
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {str: str},
    "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": {"NoSchedule"}}],
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet"},
    "volumes": [VOLUME],
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "env": [{"name!": str, "value": str}],
            "ports": [{"containerPort!": int}],
            "resources": {"limits": {str: int}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]}
JOB = {
    "completionMode": {"Indexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": {"FailJob", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]},
    "template!": {"metadata": NAMES, "spec!": POD},
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "namespace": str, **NAMES},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": ACTIONS, "onJobFailureReasons": [REASONS]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"metadata": NAMES, "spec!": JOB}}],
    },
}


def check(value, schema, where="") -> None:
    """Refuses what is not of the schema: an unknown field, a field that is missing, another type or value."""
    match schema:
        case set():
            assert value in schema, f"{where} is {value}"
        case [inner]:
            assert isinstance(value, list), where
            for number, entry in enumerate(value):
                check(entry, inner, f"{where}[{number}]")
        case dict() if str in schema:
            assert isinstance(value, dict), where
            for name, entry in value.items():
                check(name, str, where)
                check(entry, schema[str], f"{where}.{name}")
        case dict():
            fields = {name.removesuffix("!"): inner for name, inner in schema.items()}
            assert isinstance(value, dict), where
            assert set(value) <= set(fields), f"{where} has {set(value) - set(fields)}"
            assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), f"{where} has too little"
            for name, entry in value.items():
                check(entry, fields[name], f"{where}.{name}")
        case _:
            assert type(value) is schema, f"{where} is {value!r}"


EVERY_OPTION = (
    *("--queue=q", "--spot", "--host-network", "--volume=claim:/data", "--service-account=me", "--env=A=1"),
    *("--namespace=ml", "--setup=true", "--ref=v1", "--repository=https://host/you/moejax.git"),
)


@pytest.mark.parametrize("more", [(), EVERY_OPTION], ids=["plain", "every option"])
def test_the_manifest_is_a_job_set(more):
    manifest = yaml.safe_load(dry(*GKE, "--slices=2", *more))
    check(manifest, JOB_SET)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounts = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert mounts == [volume["name"] for volume in pod["volumes"]]
    assert len(set(mounts)) == len(mounts) == 2 + ("--volume=claim:/data" in more)
    assert (
        subprocess.run(["bash", "-n", "-c", expanded(container(yaml.safe_dump(manifest))["command"][2])]).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("tpu", "accelerator", "hosts", "chips", "xpk"),
    [
        ("v4:2x2x2", "tpu-v4-podslice", 2, 4, "v4-16"),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1, "v5litepod-1"),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4, "v5litepod-256"),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4, "v5p-128"),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4, "v6e-16"),
    ],
)
def test_a_slice_is_a_job_of_a_pod_a_host_with_its_chips(tpu, accelerator, hosts, chips, xpk):
    slices = 2 if hosts > 1 else 1
    job_set = yaml.safe_load(dry(*GKE, f"--tpu={tpu}", f"--slices={slices}"))["spec"]["replicatedJobs"][0]
    job = job_set["template"]["spec"]
    assert (job_set["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.partition(":")[2],
    }
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    words = shlex.split(dry(*XPK, f"--tpu={tpu}", f"--slices={slices}"))
    assert {f"--tpu-type={xpk}", f"--num-slices={slices}", "--max-restarts=100"} <= set(words)


def cluster(tools, state) -> None:
    """gcloud with a pod of two hosts, which are folders here; Python and the bucket's mount are stand-ins, too."""
    executable(
        tools / "gcloud",
        f"""\
        #!{sys.executable} -S
        import os, pathlib, shlex, shutil, subprocess, sys
        with open("{state}/gcloud", "a") as log:
            log.write(shlex.join(sys.argv[1:5]) + "\\n")
        homes = [pathlib.Path("{state}") / name for name in ("host0", "host1")]
        action, running = sys.argv[4], []
        assert action == "create" or "--worker=all" in sys.argv
        for home in homes:
            home.mkdir(exist_ok=True)
            if action == "scp":
                name, _, target = sys.argv[6].partition(":")
                shutil.copy(sys.argv[5], home / target)
            elif action == "ssh":
                (command,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--command=")]
                running.append(subprocess.Popen(["sh", "-c", command], env=dict(os.environ, HOME=str(home))))
        sys.exit(max([host.wait() for host in running], default=0))
        """,
    )
    executable(
        tools / "fake_python",
        f"""\
        #!/bin/bash
        [ "$2" != venv ] || {{ mkdir -p venv/bin && cp "$0" venv/bin/python && cp {tools}/moejax venv/bin; }}
        [ "$2" != pip ] || [ -f moejax/__init__.py ] || exit 1
        """,
    )
    for name in ("mountpoint", "gcsfuse", "sudo"):
        executable(tools / name, f'#!/bin/sh\necho {name} "$@" >> {state}/mounts\n[ {name} != mountpoint ]\n')


def test_a_tpu_pod_trains_on_every_host_until_it_is_stopped(tools, tmp_path):
    cluster(tools, tmp_path)
    variables = environment(tools, WAIT="1")
    start = (*TPU_VM, "--create=v5p:2x2x2", "--workdir=gs://bucket/runs/a", "--python=fake_python")
    begun = launch(*start, env=variables)
    try:
        assert begun.returncode == 0, begun.stderr
        assert begun.stdout.count("runs as process") == 2
        actions = [line.split()[-1] for line in (tmp_path / "gcloud").read_text().splitlines()]
        assert actions == ["create", "scp", "ssh"]
        assert (tmp_path / "host1/moejax/src/moejax/cli").is_dir()
        assert not (tmp_path / "host1/moejax/src/.git").exists()
        fuse = "gcsfuse --implicit-dirs --rename-dir-limit=200000 bucket /mnt/gcs/bucket"
        assert (tmp_path / "mounts").read_text().count(fuse) == 2

        again = launch(*start, env=variables)
        assert again.returncode == 1
        assert again.stderr.count("moejax runs here as process") == 2
        status = launch(*TPU_VM, "--status", train=(), env=variables)
        assert status.stdout.count("runs as process") == status.stdout.count("training") == 2
    finally:
        stopped = launch(*TPU_VM, "--stop", train=(), env=variables)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("stopped by SIGTERM after step 7, saved") == 2
    assert launch(*TPU_VM, "--status", train=(), env=variables).stdout.count("does not run") == 2
    assert len(calls(tools)) == 2


def test_a_host_where_training_ends_at_once_says_why(tools, tmp_path):
    cluster(tools, tmp_path)
    done = launch(*TPU_VM, "--workdir=/shared/a", "--python=fake_python", env=environment(tools, STATUS="2"))
    assert done.returncode == 1
    assert done.stderr.count("training\n") == done.stderr.count("moejax train has ended; see ~/moejax/log") == 2


@pytest.mark.parametrize("ref", ["main", "v1", "hash"])
def test_a_ref_is_fetched_from_git_in_place_of_what_was_there(ref, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
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
    monkeypatch.syspath_prepend(str(SCRIPTS))
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
    script = SCRIPTS / f"launch_{arguments[0]}.py"
    monkeypatch.syspath_prepend(str(SCRIPTS))
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
    [(SLURM, "sbatch"), (GKE, "kubectl"), (XPK, "xpk"), ((*TPU_VM, "--workdir=/a"), "gcloud")],
)
def test_a_tool_that_is_missing_is_named(arguments, tool, tmp_path):
    done = launch(*arguments, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    name = f"launch_{arguments[0]}.py"
    assert done.stderr.startswith(f"{name}: {tool} is not on PATH; install it, or add --dry-run")


def signalled(command, variables, tools, number) -> tuple[str, int]:
    """What the command writes, and its exit status, when it gets the signal once moejax trains."""
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 20
        while not calls(tools):
            assert time.monotonic() < end, "moejax did not begin"
            time.sleep(0.01)
        process.send_signal(number)
        return process.communicate(timeout=20)[0], process.returncode
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
