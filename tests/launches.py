"""Launchers as a user runs them, and stand-ins for moejax, gcloud and srun on which their shell runs."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

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


def make_tools(folder: pathlib.Path) -> pathlib.Path:
    """A folder for PATH. Its moejax notes how it was called, and with WAIT=1 trains until SIGTERM, as moejax does."""
    folder = folder / "tools"
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
