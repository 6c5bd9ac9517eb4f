"""The subcommands: each takes its arguments and the overrides of the config, and returns the exit status.

Heavy imports (jax, flax, orbax) wait until a subcommand runs, so that --help and a mistyped flag answer at once.
"""

import argparse
import json
import os
import pathlib
import sys

from moejax import config as config_lib
from moejax.cli.overrides import overridden, read_config, variations
from moejax.training import peers, processes


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Trains, or resumes what is in the workdir."""
    config = read_config(arguments.config, overrides)
    if arguments.start_timeout <= 0:
        raise config_lib.ConfigError(f"--start_timeout={arguments.start_timeout:g} must be above 0 seconds; change it")
    place = processes.find(arguments.coordinator, arguments.num_processes, arguments.process_id)
    from moejax.training import compiled, trainer

    compiled.keep_programs()
    try:
        with processes.joined(place, config, start_timeout=arguments.start_timeout):
            trainer.train(config, arguments.workdir)
    except (trainer.TrainingError, peers.PeerError) as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(arguments: argparse.Namespace, _: list[str]) -> int:
    """Loss and perplexity on the held-out split."""
    from moejax.analysis import run as run_lib
    from moejax.training import compiled

    compiled.keep_programs()
    summary = run_lib.evaluate_run(run_lib.load(arguments.workdir))
    if arguments.json:
        print(json.dumps(summary))
        return 0
    by_byte = summary["bits_per_byte"]
    print(
        f"step {summary['step']}: validation loss {summary['loss']:.4f} nats/token, perplexity "
        f"{summary['perplexity']:.2f}{'' if by_byte is None else f', {by_byte:.4f} bits/byte'} "
        f"({summary['documents']:,} documents, {summary['tokens']:,} tokens)"
    )
    baselines = ", ".join(f"{name} {nats:.4f}" for name, nats in summary["baselines"].items())
    print(f"baselines on the same documents, nats/token: {baselines}")
    return 0


def generate(arguments: argparse.Namespace, _: list[str]) -> int:
    """Continues prompts."""
    from moejax.analysis import generation
    from moejax.analysis import run as run_lib
    from moejax.training import compiled

    request = generation.request(arguments)
    stream = generation.streams(arguments, request)
    compiled.keep_programs()
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


def verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compares the loss and gradients of a small version of a model on meshes, microbatches and dispatchers."""
    if arguments.devices < 1:
        raise config_lib.ConfigError(f"--devices={arguments.devices} must be 1 or more; change it")
    config = read_config(arguments.config, overrides)
    from moejax.analysis import combinations, reduction, verify_table
    from moejax.analysis import verify as verify_lib

    named = overridden(overrides)
    devices = verify_lib.cpu_devices(arguments.devices)
    small = reduction.reduce(config, named, len(devices))
    chosen = combinations.cover(small, named, len(devices))
    reduced = reduction.changes(config, small)
    about = ", ".join(f"{path}={'+'.join(new) if isinstance(new, list) else new}" for path, new in reduced.items())
    print(f"reduced to {about}; on {len(devices)} virtual CPU devices, in float32", file=sys.stderr)
    print(f"runs {combinations.RULE.format(len(devices))}", file=sys.stderr)
    verifier = verify_lib.Verifier(config, small, devices)
    table, outcomes = verify_table.Table(small, verifier.groups, chosen), []
    for outcome in verifier.run(chosen):
        if not (arguments.json or outcome.skipped):
            if all(earlier.skipped for earlier in outcomes):
                print(table.header())
            print(table.row(outcome), flush=True)
        outcomes.append(outcome)
    if all(outcome.skipped for outcome in outcomes):
        raise config_lib.ConfigError(outcomes[0].skipped)
    passed = not any(outcome.failures for outcome in outcomes)
    if arguments.json:
        rows = [verify_table.to_json(outcome) for outcome in outcomes]
        about = {"passed": passed, "tolerance": verify_lib.TOLERANCE, "reduced": reduced}
        print(json.dumps(about | {"combinations": rows}))
    else:
        print("\n".join(["", *verify_table.summary(outcomes, len(devices))]))
    return 0 if passed else 1


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compiles the training step for TPUs that are not here: what it would need, send, cost and take there."""
    from moejax.analysis import topology

    where = topology.parse(arguments.topology, arguments.slices)
    if arguments.search_batch < 0:
        raise config_lib.ConfigError(f"--search_batch={arguments.search_batch} must be 0 or more; change it")
    rows = variations(arguments.vary)
    configs = [
        read_config(arguments.config, [*overrides, *(f"--config.{field}={value}" for field, value in row.items())])
        for row in rows
    ]
    topology.prepare()
    from moejax.analysis import plan as plan_lib
    from moejax.analysis import plan_table

    devices = topology.devices(where)
    meshes = [plan_lib.mesh_of(config, devices) for config in configs]  # refuses before anything is compiled
    plans = []
    for config, mesh, row in zip(configs, meshes, rows, strict=True):
        said = " ".join(f"{field}={value}" for field, value in row.items())
        print(f"compiling for {mesh.size} devices of {where.name} {said}".rstrip(), file=sys.stderr, flush=True)
        plans.append(plan_lib.make(config, where, mesh, probes=arguments.search_batch, say=processes.say))
    if arguments.json:
        values = [one.to_json() | ({"varied": row} if row else {}) for one, row in zip(plans, rows, strict=True)]
        print(json.dumps(values if arguments.vary else values[0]))
    else:
        print(plan_table.grid(plans, rows) if arguments.vary else plan_table.page(plans[0]))
    return 0


def report(arguments: argparse.Namespace, _: list[str]) -> int:
    """One self-contained HTML page about one run or several, or about a sweep."""
    from moejax.analysis import report as report_lib

    if report_lib.is_sweep(arguments.folders):  # whose points have their evaluation already
        from moejax.sweep import folder

        folder.refresh(arguments.folders[0])
        print(report_lib.write(arguments.folders, arguments.output, baseline=arguments.baseline))
        return 0
    if arguments.baseline is not None:
        raise config_lib.ConfigError(
            f"--baseline={arguments.baseline} is for a sweep, whose settings it compares; leave it out"
        )
    from moejax.analysis import generation, run_files
    from moejax.training import compiled

    compiled.keep_programs()
    for folder in arguments.folders:
        run_files.read(folder)  # refuses what is not a run's folder before anything is computed
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
