"""What the command line takes."""

import argparse
import pathlib
import typing
from typing import Any

from moejax import config as config_lib
from moejax.cli import commands as commands_lib
from moejax.cli import sweep as sweep_lib


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise config_lib.ConfigError(f"{message}; see {self.prog} --help")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a subcommand, with `after` for what follows `--`; and those that it does not know."""
    cut = argv.index("--") if "--" in argv else len(argv)
    words = [" ".join(argv[:2]), *argv[2:cut]] if argv[:2] == ["sweep", "fit"] else argv[:cut]
    arguments, rest = build().parse_known_args(words)
    arguments.after = argv[cut + 1 :]
    if arguments.after and arguments.function is not sweep_lib.sweep:
        raise config_lib.ConfigError(f"-- {arguments.after[0]} is not for moejax {arguments.command}; see --help")
    return arguments, rest


def build() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moejax",
        description="Sparse experts and state space models in JAX.",
        allow_abbrev=False,
        epilog=_TOUR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, function: Any, example: str, group: Any = commands) -> argparse.ArgumentParser:
        help_line = (function.__doc__ or "").strip()
        sub = group.add_parser(
            name,
            help=help_line,
            description=help_line,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(function=function)
        return sub

    def takes_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config(ARG)")
        sub.add_argument_group("overrides", "--config.a.b=VALUE sets a field, e.g. --config.model.moe.num_experts=32")

    def takes_workdir(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--workdir", required=True, type=pathlib.Path, metavar="DIR", help="the run's folder")

    def writes_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON for a program to read")

    sub = command(
        "train", commands_lib.train, "moejax train --config=configs/quickstart.py --workdir=runs/a --config.data.seed=1"
    )
    takes_config(sub)
    takes_workdir(sub)
    several = sub.add_argument_group(
        "several processes",
        "found by themselves on TPU pods, GKE, SLURM and Open MPI; elsewhere every process is started with all three. "
        "All see one --workdir, on a shared disk",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="process 0's host, and a free port of it")
    several.add_argument("--num_processes", type=int, metavar="N", help="1 trains alone, whatever the cluster")
    several.add_argument("--process_id", type=int, metavar="I", help="this one's number, from 0")
    several.add_argument(
        "--start_timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="wait so long for all to come, then say who is missing (default 300)",
    )

    sub = command("eval", commands_lib.evaluate, "moejax eval --workdir=runs/a")
    takes_workdir(sub)
    writes_json(sub)

    sub = command(
        "generate", commands_lib.generate, 'moejax generate --workdir=runs/a --prompt="The river" --temperature=0.8'
    )
    takes_workdir(sub)
    sub.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="how a document begins, or for an encoder-decoder a text with <extra_id_0>, <extra_id_1>, ... for what is "
        "left out; may be given several times",
    )
    sub.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="more prompts, one a line")
    sub.add_argument("--num_tokens", type=int, default=100, help="tokens to write at most (default 100)")
    sub.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt (default 1)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token (default 0.8)")
    sub.add_argument("--top_k", type=int, default=50, help="draw from so many tokens; 0 for all (default 50)")
    sub.add_argument("--top_p", type=float, default=1.0, help="and of those from so much probability (default 1: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    sub.add_argument("--stop", action="append", default=[], help="text to end before; may be given several times")
    sub.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show tokens as they are made (default: on a terminal, if there is one continuation)",
    )
    sub.add_argument("--label", default="", help="topic or domain of the documents, for model.moe.router=label")
    sub.add_argument(
        "--max_length",
        type=int,
        default=0,
        help="longest prompt + continuation, of an encoder-decoder either one (default: a training row with attention, "
        "else no limit)",
    )
    writes_json(sub)

    sub = command(
        "params", commands_lib.params, "moejax params --config=configs/quickstart.py --config.model.moe.num_experts=64"
    )
    takes_config(sub)
    writes_json(sub)

    sub = command("verify", commands_lib.verify, "moejax verify --config=configs/quickstart.py --config.mesh.expert=4")
    takes_config(sub)
    sub.add_argument("--devices", type=int, default=8, metavar="N", help="virtual devices (default 8)")
    writes_json(sub)

    sub = command(
        "plan",
        commands_lib.plan,
        "moejax plan --config=configs/moe_mamba.py:moe_mamba_100m --topology=v5p:4x4x4",
    )
    takes_config(sub)
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="a TPU slice, e.g. v5p:4x4x4 or v5e:16x16")
    sub.add_argument("--slices", type=int, default=1, help="so many of them, joined by the slow network (default 1)")
    sub.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="a row for each value, e.g. model.moe.num_experts=8,32,128; several: all combinations",
    )
    sub.add_argument(
        "--search_batch",
        type=int,
        default=0,
        metavar="PROBES",
        help="search the largest batch that fits with at most so many more compilations (default 0: none)",
    )
    writes_json(sub)

    sub = command(
        "sweep",
        sweep_lib.sweep,
        "moejax sweep --config=configs/sweeps/experts_mini.py --workdir=runs/experts_mini --jobs=2",
    )
    sub.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_sweep(ARG)")
    sub.add_argument_group("overrides", "--config.a.b=VALUE sets a field of the base that the points differ from")
    sub.add_argument("--workdir", metavar="DIR", help="the sweep's folder; a call on the same folder goes on")
    sub.add_argument("--seeds", default="", metavar="I,I", help="in place of those in the file, e.g. 0,1,2")
    sub.add_argument("--only", default="", metavar="NAME,NAME", help="run these points alone")
    sub.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="points side by side, which share the GPUs; 0 runs none and only collects (default 1)",
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="list the points, and how long they take here, or print what a launcher would submit",
    )
    sub.add_argument(
        "--probe_steps",
        type=int,
        default=5,
        metavar="N",
        help="of a dry run: steps to measure of each group of points; 0 measures none (default 5; none with --plan)",
    )
    planning = sub.add_argument_group("planning")
    planning.add_argument(
        "--plan", action="store_true", help="compile every point for a TPU slice, drop what is too large"
    )
    planning.add_argument("--topology", metavar="CHIP:SHAPE", help="the slice, e.g. v5p:4x4x4 or v5e:16x16")
    planning.add_argument("--slices", type=int, default=1, help="so many of them (default 1)")
    launching = sub.add_argument_group("launching", "what follows -- is for the launcher")
    launching.add_argument(
        "--launcher",
        choices=sweep_lib.LAUNCHERS,
        default="local",
        help="local: this machine (default); slurm: a job array, through submitit, e.g. -- --time=720 --partition=gpu; "
        "gke: a JobSet a point, by scripts/launch_gke.py, e.g. -- --name=moe --tpu=v5e:4x4 --image=me/moejax:1 "
        "(which are done it cannot know: name the others by --only)",
    )
    writes_json(sub)

    sub = command("sweep fit", sweep_lib.fit, "moejax sweep fit runs/experts_25m")
    sub.add_argument("folder", type=pathlib.Path, metavar="DIR", help="a sweep's folder")
    writes_json(sub)

    sub = command("report", commands_lib.report, "moejax report runs/a runs/b")
    sub.add_argument("folders", nargs="+", type=pathlib.Path, metavar="DIR", help="folders of runs, or that of a sweep")
    sub.add_argument("--output", type=pathlib.Path, help="page to write (default: report.html in the first folder)")
    sub.add_argument(
        "--baseline", metavar="SETTING", help="of a sweep: what others are compared with (default: its own)"
    )

    about = "Prepares a corpus, and shows it."
    data = commands.add_parser("data", help=about, description=about, allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    source = "--config.data.source=files:c4-train.*.json.gz --config.data.tokenizer=gpt2"
    sub = command(
        "prepare",
        commands_lib.data_prepare,
        f"moejax data prepare --config=configs/c4.py --output=c4_gpt2 {source}",
        actions,
    )
    takes_config(sub)
    sub.add_argument("--output", required=True, metavar="DIR", help="local folder; a call on the same folder goes on")
    sub.add_argument(
        "--form",
        choices=("documents", "rows"),
        default="documents",
        help="documents: a record a document, any packing and length in training (default); rows: packed here",
    )
    sub.add_argument("--num_shards", type=int, default=0, help="training shards (default: one for 256 MB of files)")
    sub.add_argument("--shard", default="0/1", metavar="I/N", help="make every N-th shard from the I-th on")
    writes_json(sub)
    sub = command(
        "inspect", commands_lib.data_inspect, f"moejax data inspect --config=configs/c4.py --rows=2 {source}", actions
    )
    takes_config(sub)
    sub.add_argument("--rows", type=int, default=4, help="rows to show (default 4)")
    writes_json(sub)
    return parser


_TOUR = """\
a first tour:
  moejax train    --config=configs/quickstart.py --workdir=runs/a
  moejax eval     --workdir=runs/a
  moejax generate --workdir=runs/a --prompt="The river"
  moejax report   runs/a"""
