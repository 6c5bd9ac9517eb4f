"""Trains on all hosts of a TPU VM, or of a queued resource of several slices, by gcloud's ssh.

    python scripts/launch_tpu_vm.py --name=my-pod --zone=us-east5-a --create=v5p:4x4x4 \\
        --workdir=gs://my-bucket/runs/moe32 -- --config=configs/c4.py --config.mesh.expert=16
    python scripts/launch_tpu_vm.py --name=my-pod --zone=us-east5-a --status     # on every host, and its last lines
    python scripts/launch_tpu_vm.py --name=my-pod --zone=us-east5-a --stop       # save a checkpoint and end

Every host gets the files of this checkout (or --ref, from git), installs them into ~/moejax/venv, and starts the same
`moejax train`, which finds the other hosts by itself and outlives the ssh connection; it writes to ~/moejax/log. A run
that was stopped, or whose TPU was pre-empted and made again, goes on when the same command is given again.

A workdir in a bucket is mounted by Cloud Storage FUSE, which the hosts must have (--setup can install it); the bucket
should have a hierarchical namespace, where a finished checkpoint is renamed in one step.
"""

import pathlib
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence

import launching

PARCEL = "moejax.tar.gz"  # in the home folder of every host
RUNNING = 'running() { pid=$(cat ~/moejax/pid 2>/dev/null) && grep -qs moejax "/proc/$pid/cmdline"; }'

STATUS = f"""\
{RUNNING}
if running; then echo "$(hostname): runs as process $pid"; else echo "$(hostname): does not run"; fi
tail -n 3 ~/moejax/log 2>/dev/null || true"""

STOP = f"""\
{RUNNING}
running || {{ echo "$(hostname): does not run"; exit 0; }}
kill -TERM "$pid"
for second in $(seq 600); do running || break; sleep 1; done
if running; then echo "$(hostname): process $pid has not ended in 10 minutes" >&2; exit 1; fi
echo "$(hostname): $(tail -n 1 ~/moejax/log)\""""

START = """\
set -eu
refuse() {{ echo "$(hostname): $1" >&2; exit 2; }}
{running}
mkdir -p ~/moejax && cd ~/moejax
if running; then refuse "moejax runs here as process $pid; end it with --stop"; fi
{setup}{mount}{fetch}
[ -x venv/bin/python ] || {{
    {python} -c 'import sys; sys.exit(sys.version_info < (3, 11))' || refuse {too_old}
    {python} -m venv venv
}}
cd src
../venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable '.[tpu]'
{exports}PATH="$HOME/moejax/venv/bin:$PATH" nohup {train} >>../log 2>&1 </dev/null &
echo $! >../pid
for second in $(seq 20); do  # bad input shows at once
    running || {{ tail -n 5 ../log >&2; refuse "moejax train has ended; see ~/moejax/log"; }}
    sleep 1
done
echo "$(hostname): runs as process $pid, log in ~/moejax/log\""""

MOUNT = """\
mountpoint -q {folder} || {{
    command -v gcsfuse >/dev/null || refuse 'gcsfuse is not here to mount the bucket; install it by --setup'
    sudo mkdir -p {folder} && sudo chown "$(id -u)" {folder} && gcsfuse {options} {bucket} {folder}
}}
"""


def launch(argv: Sequence[str]) -> bool:
    """Does what is asked for on all hosts; says whether all of it went well."""
    parser = launching.Parser(__doc__)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="(default: gcloud's)")
    parser.add_argument("--queued-resource", action="store_true", help="NAME is a queued resource; all its slices")
    parser.add_argument("--create", metavar="KIND:TOPOLOGY", help="make the TPU VM first, e.g. v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--spot", action="store_true", help="of --create: a Spot TPU")
    parser.add_argument("--workdir", help="gs://BUCKET/PATH, or an absolute path on a file system that all hosts share")
    launching.takes_source(parser)
    parser.add_argument("--python", default="python3", help="3.11 or later, with venv (default python3)")
    parser.add_argument("--status", action="store_true", help="say what every host does")
    parser.add_argument("--stop", action="store_true", help="let every host save a checkpoint and end")
    options, arguments = parser.parse(argv)
    launching.require("gcloud", options.dry_run)
    if options.status or options.stop:
        if arguments or (options.status and options.stop):
            raise launching.LaunchError("--status and --stop stand alone, without the other and without --; choose one")
        return on_all_hosts(options, STATUS if options.status else STOP)

    commands = []
    if options.create:
        if options.queued_resource:
            raise launching.LaunchError(
                "--create makes one slice; make a queued resource with gcloud, and leave it out"
            )
        commands.append(create(options, launching.tpu_slice("--create", options.create)))
    elif options.spot:
        raise launching.LaunchError("--spot goes with --create")
    if not options.workdir:
        raise launching.LaunchError("no --workdir; name gs://BUCKET/PATH or a folder that all hosts share")
    source = launching.source(options)
    script = start(options, source, arguments)
    if not all(launching.run(command, dry_run=options.dry_run) for command in commands):
        return False
    return (source is not None or send(options)) and on_all_hosts(options, script)


def create(options, tpu: launching.Slice) -> list[str]:
    """gcloud's command that makes a TPU VM of one slice."""
    if tpu.tpu.runtime is None:
        raise launching.LaunchError(
            f"--create={options.create}: gcloud makes no TPU VM of this kind; use launch_gke.py"
        )
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "create", options.name, *located(options)),
        *(f"--accelerator-type={tpu.accelerator_type}", f"--version={tpu.tpu.runtime}"),
        *(["--spot"] if options.spot else []),
    ]


def start(options, source: launching.Source | None, arguments: Sequence[str]) -> str:
    """What a host runs to install moejax and to start training in the background."""
    where = launching.place(options.workdir)
    mount = ""
    if where.bucket and where.mount:
        fuse = shlex.join(f"--{option}" for option in where.OPTIONS)
        mount = MOUNT.format(folder=shlex.quote(where.mount), options=fuse, bucket=shlex.quote(where.bucket))
    unpack = f"rm -rf src && mkdir src && tar -xzf ~/{PARCEL} -C src"
    python = shlex.quote(options.python)
    return START.format(
        running=RUNNING,
        setup=f"{options.setup}\n" if options.setup else "",
        mount=mount,
        fetch=source.fetch("src") if source else unpack,
        python=python,
        too_old=shlex.quote(f"{options.python} is not 3.11 or later; install one by --setup, name it by --python"),
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in options.env),
        train=shlex.join(launching.train_command(where.path, arguments)),
    )


def send(options) -> bool:
    """Copies this checkout to all hosts: what git follows or would, with changes that are not committed."""
    launching.require("git", dry_run=False)
    listed = ["git", "-C", str(launching.ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True)
    if done.returncode:
        raise launching.LaunchError(f"{launching.ROOT} is no git checkout to copy to the hosts; give --ref")
    names = sorted(name for name in done.stdout.split("\0") if name and (launching.ROOT / name).is_file())
    command = [*gcloud(options), "scp", PARCEL, f"{options.name}:{PARCEL}", *to_all(options)]
    if options.dry_run:
        print(f"# {len(names)} files of {launching.ROOT} go into {PARCEL}, in a temporary folder")
        return launching.run(command, dry_run=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(pathlib.Path(folder) / PARCEL, "w:gz") as archive:
            for name in names:
                archive.add(launching.ROOT / name, name)
        return launching.run(command, dry_run=False, folder=folder)


def on_all_hosts(options, script: str) -> bool:
    # gcloud's ssh runs the command in the user's login shell, whatever that is
    command = f"bash -c {shlex.quote(script)}"
    return launching.run(
        [*gcloud(options), "ssh", options.name, *to_all(options), f"--command={command}"], dry_run=options.dry_run
    )


def gcloud(options) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources" if options.queued_resource else "tpu-vm"]


def to_all(options) -> list[str]:
    return ["--worker=all", *(["--node=all"] if options.queued_resource else []), *located(options)]


def located(options) -> list[str]:
    return [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]


if __name__ == "__main__":
    launching.main(launch)
