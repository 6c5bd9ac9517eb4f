"""Trains on GPUs of several nodes under SLURM.

    python scripts/launch_slurm.py --name=moe32 --nodes=2 --gpus-per-node=8 --time=12:00:00 \\
        --workdir=/shared/runs/moe32 --partition=gpu -- --config=configs/c4.py --config.mesh.expert=8

Run it on a login node, in a checkout that all nodes share (with .venv made by `pip install -e .[cuda]`). It submits one
batch script; --dry-run prints it, to be read or changed: `... --dry-run > job.sh; sbatch job.sh`.

One process a GPU, each seeing all GPUs of its node: that is what jax.distributed takes from SLURM's variables. Shortly
before the time limit every process is told to save, and the job puts itself into the queue again; SLURM does that
itself to a job that is pre-empted or loses a node. Either way the same command goes on from the last checkpoint.
"""

import pathlib
import re
import shlex
from collections.abc import Sequence

import launching

SCRIPT = """\
#!/bin/bash
# made by scripts/launch_slurm.py; submitted again, it goes on from the last checkpoint
{header}

{exports}cd {root} || exit 1
{setup}

# The signal comes to this shell alone. It goes on to the processes of the job's steps through scancel: srun itself
# would answer SIGTERM by killing them. They save, and end with 0 as a finished run does; so this shell remembers.
again=
at_limit() {{ again=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap at_limit USR1

# --gpu-bind=none: process i of a node takes the node's GPU i, so it must see them all
# --cpus-per-task: srun has not taken it from sbatch since SLURM 22.05
# --kill-on-bad-exit=0, --wait: when one ends, the others may finish a checkpoint, but not hang for ever
srun --gpu-bind=none --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={grace} --label{srun} \\
    {train} &
steps=$!
wait "$steps"; status=$?
while kill -0 "$steps" 2>/dev/null; do wait "$steps"; status=$?; done  # the trap ended the first wait

if [ "$again" ]; then
    echo "the time limit was near: queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def launch(argv: Sequence[str]) -> bool:
    """Submits the job; says whether sbatch took it."""
    parser = launching.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder, on a file system that all nodes share")
    parser.add_argument("--nodes", type=int, default=1, help="(default 1)")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="and processes a node")
    parser.add_argument("--gpu-type", default="", help="as SLURM names it, e.g. h100")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, help="(default 8)")
    parser.add_argument("--time", required=True, help="limit: minutes, hours:minutes:seconds or days-hours")
    parser.add_argument("--grace", type=int, default=180, help="seconds before the limit to save in (default 180)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="more for sbatch; repeatable")
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="more for srun, e.g. a container")
    parser.add_argument("--moejax", help="the executable (default: this checkout's .venv/bin/moejax)")
    options, arguments = parser.parse(argv)
    launching.require("sbatch", options.dry_run)
    if not options.workdir.startswith("/"):
        raise launching.LaunchError(
            f"--workdir={options.workdir} must be an absolute path that all nodes share; change it"
        )
    script = job(options, arguments)
    if options.dry_run:
        print(script, end="")
        return True
    pathlib.Path(options.workdir).mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for the log
    return launching.run(["sbatch"], dry_run=False, text=script)


def job(options, arguments: Sequence[str]) -> str:
    """The batch script."""
    for option in ("nodes", "gpus_per_node", "cpus_per_gpu", "grace"):
        launching.at_least(f"--{option.replace('_', '-')}", getattr(options, option), 1)
    if not re.fullmatch(r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}", options.time):
        raise launching.LaunchError(f"--time={options.time} must be like 90, 12:00:00 or 2-12; change it")
    gpu = f"gpu:{options.gpu_type}:" if options.gpu_type else "gpu:"
    lines = [
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node}",
        f"--gres={gpu}{options.gpus_per_node}",
        f"--cpus-per-task={options.cpus_per_gpu}",
        f"--time={options.time}",
        f"--signal=B:USR1@{options.grace}",
        "--requeue",
        f"--output={options.workdir.replace('%', '%%')}/slurm-%j.log",  # %j: the job, the same after a requeue
        "--open-mode=append",
        *(f"--{name}={value}" for name in ("partition", "account") if (value := getattr(options, name))),
        *options.sbatch,
    ]
    for line in lines:
        if "\n" in line or not line.startswith("-"):
            raise launching.LaunchError(f"{line!r} is no option for sbatch; write it as --option=value, in one line")
    here = launching.ROOT / ".venv" / "bin" / "moejax"
    executable = options.moejax or (str(here) if here.exists() else "moejax")
    train = launching.train_command(options.workdir, arguments, executable)
    return SCRIPT.format(
        header="\n".join(f"#SBATCH {shlex.quote(line)}" for line in lines),
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in options.env),
        root=shlex.quote(str(launching.ROOT)),
        setup=f"{{ {options.setup}\n}} || exit 1" if options.setup else "",
        cpus=options.cpus_per_gpu,
        grace=options.grace,
        srun="".join(f" {shlex.quote(option)}" for option in options.srun),
        train=shlex.join(train),
    )


if __name__ == "__main__":
    launching.main(launch)
