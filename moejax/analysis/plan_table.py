"""Plans as text: a page of one, or a row for each of many."""

from moejax.analysis import plan as plan_lib

UNITS = ("", "K", "M", "G", "T", "P", "E")
GIB = 2**30


def page(plan: plan_lib.Plan) -> str:
    """Everything that a plan says."""
    memory, parameters = plan.memory, plan.parameters
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    lines = [
        f"{'topology':<12}{slices}{plan.topology}: {plan.chips} chips, {plan.devices} devices, {plan.hosts} hosts; "
        f"{plan.batch_size} rows a step",
        f"{'mesh':<12}{plan.layout.removeprefix('mesh: ')}",
        f"{'parameters':<12}{parameters['total']:,} in all, {parameters['active']:,} active (without embedding and "
        f"head {parameters['non_embedding_total']:,} and {parameters['non_embedding_active']:,}); "
        f"{parameters['per_device']:,} a device",
        f"{'memory':<12}{_memory(memory)}",
    ]
    if plan.largest_batch is None:
        lines.append(f"{'':<12}the largest batch that fits: --search_batch=8 looks for it, a compilation a probe")
    else:
        lines.append(f"{'':<12}the largest batch that was found to fit: {plan.largest_batch} rows")
    lines.append(f"{'compiled in':<12}{plan.compile_seconds:.0f} s")
    if plan.work is None or plan.bound is None:
        return "\n".join(lines)
    work, bound = plan.work, plan.bound
    lines += [
        f"{'FLOPs a step':<13}{_scaled(work.compiled)} compiled, {_scaled(work.analytic)} by the closed form (ratio "
        f"{work.ratio:.3f}); the model's own {_scaled(work.useful)}; Pallas kernels say {_scaled(work.kernels)}",
        "",
        f"{'collective':<20}{'mesh axis':<22}{'network':<9}{'a step':>7}{'bytes sent':>12}  largest",
    ]
    for entry in plan.collectives or ():
        lines.append(
            f"{entry['kind']:<20}{entry['axis']:<22}{entry['network']:<9}{entry['count']:>7}"
            f"{_scaled(entry['bytes']):>11}B  {entry['largest']}"
        )
    transfers = ", ".join(plan.host_transfers or ()) or "none"
    lines += [
        f"{'transfers to or from the host':<42}{transfers}",
        "",
        f"{'at least':<12}compute {_milliseconds(bound.compute_seconds)}, HBM {_milliseconds(bound.hbm_seconds)}, "
        f"ICI {_milliseconds(bound.ici_seconds)}, DCN {_milliseconds(bound.dcn_seconds)} ms a step: {bound.bound} wins",
        f"{'at most':<12}{bound.tokens_per_second:,.0f} tokens/s, MFU {bound.mfu:.1%}",
        f"{'the run':<12}{_scaled(bound.tokens)} tokens, {bound.days:.2f} days, {bound.chip_hours:,.0f} chip-hours",
    ]
    return "\n".join([*lines, *plan.notes])


def grid(plans: list[plan_lib.Plan], rows: list[dict[str, str]]) -> str:
    """A line a plan, after the values in which they differ."""
    names = [name.rpartition(".")[2] for name in rows[0]]
    heads = [*names, "params", "active", "HBM GiB", "of", "fits", "compute ms", "HBM ms", "ICI ms", "DCN ms", "bound",
             "tokens/s", "MFU", "days", "chip-hours"]  # fmt: skip
    table = [heads]
    for plan, row in zip(plans, rows, strict=True):
        memory, bound = plan.memory, plan.bound
        cells = [
            *row.values(),
            _scaled(plan.parameters["total"]),
            _scaled(plan.parameters["active"]),
            "-" if memory.total is None else f"{memory.total / GIB:.1f}",
            f"{memory.hbm / GIB:.0f}",
            "yes" if memory.fits else "no",
        ]
        if bound is None:
            cells += ["-"] * (len(heads) - len(cells))
        else:
            times = (bound.compute_seconds, bound.hbm_seconds, bound.ici_seconds, bound.dcn_seconds)
            cells += [*map(_milliseconds, times), bound.bound, f"{bound.tokens_per_second:,.0f}", f"{bound.mfu:.1%}"]
            cells += [f"{bound.days:.2f}", f"{bound.chip_hours:,.0f}"]
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table)


def _memory(memory: plan_lib.Memory) -> str:
    if memory.total is None or memory.temporaries is None or memory.outputs is None:
        return (
            f"does not fit into {memory.hbm / GIB:.0f} GiB of HBM a device: {memory.arguments / GIB:.2f} of state and "
            f"batch, and the compiler says: {memory.refusal}"
        )
    return (
        f"{memory.total / GIB:.2f} of {memory.hbm / GIB:.0f} GiB of HBM a device, fits: arguments "
        f"{memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}, outputs {memory.outputs / GIB:.2f}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _scaled(value: float) -> str:
    """Three digits and a decimal unit: 1.23T."""
    value, place = float(value), 0
    while abs(value) >= 999.5 and place + 1 < len(UNITS):
        value, place = value / 1000, place + 1
    return f"{value:.3g}{UNITS[place]}"
