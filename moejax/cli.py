"""The command `moejax`: one small function a subcommand.

Exit status: 0 done, 1 the run failed, 2 the user's input cannot be; then one line on standard error says what to mend.
Results go to standard output, everything else to standard error.
"""

import argparse
import difflib
import json
import os
import pathlib
import platform
import sys
import typing
from typing import Any

from moejax import config as config_lib
from moejax import rules

# Heavy imports (jax, flax, orbax) wait until a subcommand runs, so --help and a mistyped flag answer at once.


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand and exits."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax is imported, which reads it
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Runs a subcommand; returns the exit status."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and not hasattr(arguments, "config"):
            raise config_lib.ConfigError(f"{rest[0]} is not an argument of moejax {arguments.command}; see --help")
        return arguments.function(arguments, rest)
    except config_lib.ConfigError as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"moejax: {error.filename or 'a file'}: {error.strerror or error}; mend that and run again", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("moejax: interrupted", file=sys.stderr)
        return 130


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Trains, or resumes what is in the workdir."""
    config = read_config(arguments.config, overrides)
    from moejax.training import trainer

    keep_compiled_programs()
    try:
        trainer.train(config, arguments.workdir)
    except trainer.TrainingError as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(arguments: argparse.Namespace, _: list[str]) -> int:
    """Loss and perplexity on the held-out split."""
    from moejax.analysis import run as run_lib

    keep_compiled_programs()
    summary = run_lib.evaluate_run(run_lib.load(arguments.workdir))
    if arguments.json:
        print(json.dumps(summary))
        return 0
    print(
        f"step {summary['step']}: validation loss {summary['loss']:.4f} nats/token, perplexity "
        f"{summary['perplexity']:.2f}, {summary['bits_per_byte']:.4f} bits/byte "
        f"({summary['documents']:,} documents, {summary['tokens']:,} tokens)"
    )
    baselines = ", ".join(f"{name} {nats:.4f}" for name, nats in summary["baselines"].items())
    print(f"baselines on the same documents, nats/token: {baselines}")
    return 0


def generate(arguments: argparse.Namespace, _: list[str]) -> int:
    """Continues prompts."""
    from moejax.analysis import generation
    from moejax.analysis import run as run_lib

    request = generation.request(arguments)
    stream = generation.streams(arguments, request)
    keep_compiled_programs()
    run = run_lib.load(arguments.workdir)
    if stream:
        print(request.prompts[0], end="", flush=True)
        cost = generation.write(run, request, show=lambda piece: print(piece, end="", flush=True))[1]
        print()
    else:
        written, cost = generation.write(run, request)
        for one in written:
            print(json.dumps(one.to_json()) if arguments.json else one.prompt + one.text)
    print(cost, file=sys.stderr)
    return 0


def params(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Total and active parameters, by component."""
    config = read_config(arguments.config, overrides)
    from moejax.analysis import params as params_lib

    counts = params_lib.count(config.model)
    print(json.dumps(counts) if arguments.json else params_lib.table(counts))
    return 0


def report(arguments: argparse.Namespace, _: list[str]) -> int:
    """One self-contained HTML page about one run or several."""
    from moejax.analysis import generation
    from moejax.analysis import report as report_lib

    keep_compiled_programs()
    for folder in arguments.folders:
        report_lib.read(folder)  # refuses what is not a run's folder before anything is computed
    for folder in arguments.folders:
        try:
            generation.complete(folder)
        except config_lib.ConfigError as error:
            print(f"moejax: the report goes without an evaluation or sample: {error}", file=sys.stderr)
    print(report_lib.write(arguments.folders, arguments.output))
    return 0


def data_prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Tokenises the corpus of a config once, into shards that training reads."""
    if "://" in arguments.output:
        raise config_lib.ConfigError(f"--output={arguments.output} is remote; name a local folder, and copy it there")
    if arguments.num_shards < 0:
        raise config_lib.ConfigError(f"--num_shards={arguments.num_shards} must be 0 or more; change it")
    place, _, count = arguments.shard.partition("/")
    if not (place.isdecimal() and count.isdecimal() and int(place) < int(count)):
        raise config_lib.ConfigError(f"--shard={arguments.shard} must be i/n with i from 0 to n - 1, e.g. 0/4")
    config = read_config(arguments.config, overrides)
    from moejax.data import preparation

    outcome = preparation.prepare(
        config.data,
        pathlib.Path(arguments.output).expanduser(),
        form=arguments.form,
        num_shards=arguments.num_shards,
        part=(int(place), int(count)),
    )
    if arguments.json:
        print(json.dumps({"made": outcome.made, "missing": outcome.missing, "manifest": outcome.manifest}))
    elif outcome.missing:
        print(f"{arguments.output}: waits for {len(outcome.missing)} shards of other calls (--shard)")
    else:
        print(f"{arguments.output} is ready: --config.data.source=prepared:{arguments.output}")
    return 0


def data_inspect(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Shows the rows of a config as text, and figures of its documents."""
    if arguments.rows < 0:
        raise config_lib.ConfigError(f"--rows={arguments.rows} must be 0 or more; change it")
    config = read_config(arguments.config, overrides)
    from moejax.data import inspection, pipeline

    data = pipeline.load(config.data)
    summary = inspection.summarise(data, config.data)
    if arguments.json:
        print(json.dumps(inspection.to_json(summary)))
        return 0
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, row in enumerate(inspection.first_rows(data, config.data, arguments.rows)):
        print(f"row {number}\n{inspection.show_row(row, data.tokenizer, colour=colour)}\n")
    print(inspection.show_summary(summary))
    return 0


def keep_compiled_programs() -> None:
    """Lets jax keep compiled programs in the cache folder, so that resuming or evaluating a run starts at once.

    A folder a processor: a program compiled for one may not run on another that shares the home folder.
    """
    import jax

    from moejax.data import cache

    if jax.config.values.get("jax_compilation_cache_dir") is None:
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        folder = f"xla-{cache.digest([platform.machine(), *features])}"
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / folder))


def read_config(file: str, overrides: list[str]) -> config_lib.Config:
    """The config of FILE[:ARG] with `--config.a.b=value` overrides, validated.

    Raises:
      ConfigError: no such file, a file without a usable get_config, an unknown field, a value of the wrong type, or a
        broken rule.
    """
    from absl import flags
    from ml_collections import config_flags

    path = pathlib.Path(file.split(":")[0])
    if not path.is_file():
        raise config_lib.ConfigError(f"--config={file}: there is no file {path}; name one, e.g. configs/quickstart.py")
    _check_overrides(overrides)
    arguments = ["moejax", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments)[1:]
        config = values["config"].value
    except flags.IllegalFlagValueError as error:
        raise config_lib.ConfigError(_wrong_value(file, overrides, error)) from None
    except flags.Error as error:
        raise config_lib.ConfigError(f"{' '.join(str(error).split())}; write overrides as --config.a.b=value") from None
    except Exception as error:  # the file is the user's program: anything may come out of it
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise config_lib.ConfigError(f"--config={file} cannot be read ({what}); mend the file") from None
    if rest:
        raise config_lib.ConfigError(f"{rest[0]} is not an option; write overrides as --config.a.b=value")
    if not isinstance(config, config_lib.Config):
        raise config_lib.ConfigError(
            f"--config={file}: get_config() returned a {type(config).__name__}; return a moejax.config.Config"
        )
    rules.validate(config)
    return config


def _check_overrides(overrides: list[str]) -> None:
    """Refuses an override whose path is not a field, naming the nearest that is."""
    for override in overrides:
        if not override.startswith("--"):
            continue  # the value of the option before it
        path = override.split("=")[0]
        if not path.startswith("--config."):
            raise config_lib.ConfigError(f"{path} is not an option; overrides are written --config.a.b=value")
        name = path.removeprefix("--config.")
        known = config_lib.flatten(config_lib.Config())
        if name not in known:
            groups = {prefix for field in known for prefix in (field.rpartition(".")[0], field.split(".")[0])}
            if name in groups:
                raise config_lib.ConfigError(
                    f"{path} is a group of fields; set one of them, e.g. {path}.{_first(known, name)}"
                )
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean --config.{close[0]}?" if close else "moejax/config.py lists the fields"
            raise config_lib.ConfigError(f"{path} is not a field of the config; {hint}")


def _first(known: dict[str, Any], group: str) -> str:
    return next(field for field in known if field.startswith(f"{group}.")).removeprefix(f"{group}.")


def _wrong_value(file: str, overrides: list[str], error: Exception) -> str:
    """The line for a value that does not fit its field's type, or an ARG that the config file does not take."""
    for override in reversed(overrides):
        option, _, value = override.partition("=")
        if f"flag {option}=" in str(error):
            node: Any = config_lib.Config
            for name in option.removeprefix("--config.").split("."):
                node = typing.get_type_hints(node)[name]
            kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(node, f"{node}")
            return f"{option.removeprefix('--')}={value} has the wrong type; give {kind}"
    last = str(error).strip().splitlines()[-1].strip()
    return f"--config={file} cannot be read ({last}); leave out what follows the colon or name what get_config() takes"


# --- arguments -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise config_lib.ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
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

    sub = command("train", train, "moejax train --config=configs/quickstart.py --workdir=runs/a --config.data.seed=1")
    takes_config(sub)
    takes_workdir(sub)

    sub = command("eval", evaluate, "moejax eval --workdir=runs/a")
    takes_workdir(sub)
    writes_json(sub)

    sub = command("generate", generate, 'moejax generate --workdir=runs/a --prompt="The river" --temperature=0.8')
    takes_workdir(sub)
    sub.add_argument("--prompt", action="append", default=[], help="how a document begins; may be given several times")
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
        help="longest prompt + continuation (default: a training row with attention, else no limit)",
    )
    writes_json(sub)

    sub = command("params", params, "moejax params --config=configs/quickstart.py --config.model.moe.num_experts=64")
    takes_config(sub)
    writes_json(sub)

    sub = command("report", report, "moejax report runs/a runs/b")
    sub.add_argument("folders", nargs="+", type=pathlib.Path, metavar="DIR", help="folders of runs")
    sub.add_argument("--output", type=pathlib.Path, help="page to write (default: report.html in the first folder)")

    about = "Prepares a corpus, and shows it."
    data = commands.add_parser("data", help=about, description=about, allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    source = "--config.data.source=files:c4-train.*.json.gz --config.data.tokenizer=gpt2"
    sub = command(
        "prepare", data_prepare, f"moejax data prepare --config=configs/c4.py --output=c4_gpt2 {source}", actions
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
    sub = command("inspect", data_inspect, f"moejax data inspect --config=configs/c4.py --rows=2 {source}", actions)
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


if __name__ == "__main__":
    main()
