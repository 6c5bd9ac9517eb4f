"""What `moejax verify` prints: a table, a row a combination, and what did not agree; or the same as JSON."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from moejax import config as config_lib
from moejax.analysis import verify
from moejax.analysis.combinations import DISPATCHERS, Combination


class Table:
    """Lines of the table, one by one."""

    def __init__(self, config: config_lib.Config, groups: Sequence[str], combinations: Sequence[Combination]):
        self.losses = tuple(config.model.moe.loss_weights()) if config.model.has_experts else ()
        self.groups, self.has_experts = tuple(groups), config.model.has_experts
        self._mesh = max(len(combination.mesh_name) for combination in combinations)
        self._dispatcher = max(map(len, DISPATCHERS)) if self.has_experts else 0

    def header(self) -> str:
        """Names of the columns; those of parameter groups hold the largest relative difference of their gradients."""
        experts = [f"{'dispatch':<{self._dispatcher}}"] if self.has_experts else []
        losses = [f"{name:>10}" for name in self.losses] + ["dropped"] * self.has_experts
        groups = [f"{group:>{_width(group)}}" for group in self.groups]
        cells = [f"{'mesh':<{self._mesh}}", "parts", *experts, f"{'loss':>9}", *losses, "grad norm", *groups]
        return "  ".join(cells)

    def row(self, outcome: verify.Outcome) -> str:
        """Of a combination that ran."""
        combination, result = outcome.combination, outcome.result
        cells = [f"{combination.mesh_name:<{self._mesh}}", f"{combination.num_microbatches:>5}"]
        if self.has_experts:
            cells.append(f"{combination.dispatcher:<{self._dispatcher}}")
        if result is not None:
            cells.append(f"{result.loss:9.6f}")
            cells += [f"{result.losses[name].mean():10.4g}" for name in self.losses]
            cells += [f"{result.num_dropped:7}"] * self.has_experts
            cells.append(f"{result.grad_norm:9.5f}")
            cells += [f"{outcome.differences[group]:{_width(group)}.0e}" for group in self.groups]
        return "  ".join([*cells, "FAIL" if outcome.failures else "pass"])


def _width(group: str) -> int:
    return max(5, len(group))


def summary(outcomes: Sequence[verify.Outcome], num_devices: int) -> list[str]:
    """Lines after the table: what was skipped and why, what failed and where, and the verdict."""
    lines = []
    skipped = sorted((outcome for outcome in outcomes if outcome.skipped), key=lambda outcome: outcome.skipped)
    for reason, group in itertools.groupby(skipped, key=lambda outcome: outcome.skipped):
        mine = [outcome.combination for outcome in group]
        where = ", ".join(dict.fromkeys(combination.mesh_name for combination in mine))
        lines.append(f"skipped {where} ({'; '.join(dict.fromkeys(one.dispatcher for one in mine))}): {reason}")
    failed = [outcome for outcome in outcomes if outcome.failures]
    lines += [f"FAIL {outcome.combination}: {failure}" for outcome in failed for failure in outcome.failures]
    if any(failure.startswith("choices") for outcome in failed for failure in outcome.failures):
        lines.append(
            "a few choices may differ where two experts tie but for rounding; --config.data.seed=N runs another batch"
        )
    ran = len(outcomes) - len(skipped)
    if failed:
        lines.append(f"{len(failed)} of {ran} combinations failed; tolerance {verify.TOLERANCE:.0e}")
        return lines
    idle = max(outcome.result.num_idle for outcome in outcomes if outcome.result is not None)
    if idle:
        lines.append(f"{idle} experts got no token, so nothing is known of their gradients; raise data.batch_size")
    largest, group = max((size, group) for outcome in outcomes for group, size in outcome.differences.items())
    lines.append(
        f"passed: {ran} combinations of up to {num_devices} devices; the largest difference is {largest:.0e} "
        f"({group}), the tolerance {verify.TOLERANCE:.0e}"
    )
    return lines


def to_json(outcome: verify.Outcome) -> dict[str, Any]:
    """status (pass, fail, skipped), reason or failures, and the numbers of a row."""
    combination, result = outcome.combination, outcome.result
    row: dict[str, Any] = {
        "mesh": combination.sizes,
        "num_microbatches": combination.num_microbatches,
        "dispatcher": combination.dispatcher,
        "status": "skipped" if outcome.skipped else "fail" if outcome.failures else "pass",
    }
    if outcome.skipped:
        row["reason"] = outcome.skipped
    if result is not None:
        row |= {
            "loss": _plain(result.loss),
            "losses": {name: _plain(float(value_L.mean())) for name, value_L in result.losses.items()},
            "dropped": result.num_dropped,
            "grad_norm": _plain(result.grad_norm),
            "differences": {group: _plain(size) for group, size in outcome.differences.items()},
        }
    return row | {"failures": outcome.failures}


def _plain(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
