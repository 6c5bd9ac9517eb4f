"""What a sweep shows while it runs: a table of its points on a terminal, plain lines in a log."""

import collections
import contextlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from moejax.analysis import sweep_results
from moejax.sweep import folder, outcome, runner
from moejax.training import metrics

REFRESH = 1.0  # seconds between drawings of the table
LOG_EVERY = 180.0  # seconds between lines about the points that run, in a log
_TAIL = 2**20  # bytes of metrics.jsonl that hold its last row, however many experts it lists


class _Progress(NamedTuple):
    """Of a point. seconds_left: None until two rows were seen."""

    step: int
    loss: float | None
    ema_loss: float | None
    seconds_left: float | None


class Console(runner.Board):
    """On standard error."""

    def __init__(self, workdir: pathlib.Path, rows: Sequence[sweep_results.Row], jobs: int):
        """rows: the points that are to run or have run, in order."""
        self._workdir, self._rows, self._jobs = workdir, {row.name: row for row in rows}, max(1, jobs)
        self._terminal = sys.stderr.isatty()
        self._seen: dict[str, tuple[int, dict[str, Any] | None]] = {}  # metrics.jsonl: its time and last row
        self._first: dict[str, tuple[float, int]] = {}  # when the first row of a running point was seen, and its step
        self._drawn = 0  # lines of the table that stand on the terminal
        self._next = 0.0 if self._terminal else time.monotonic() + LOG_EVERY

    def started(self, name: str) -> None:
        """Says so in a log; the table shows it."""
        self._first.pop(name, None)
        if not self._terminal:
            self._say(f"{name} started; its log is {self._workdir / name / folder.LOG}")

    def ended(self, name: str, how: str) -> None:
        """Says how, with the losses of a point that is done."""
        found = outcome.read(self._workdir / name)
        if found is not None and found.numbers.seconds is not None:
            losses = (("loss", found.numbers.loss), ("validation loss", found.numbers.validation_loss))
            told = "".join(f", {name} {loss:.4f}" for name, loss in losses if loss is not None)
            how = f"{how} in {metrics.duration(found.numbers.seconds)}{told}"
        self._say(f"{name} {how}")

    def draw(self, running: Collection[str]) -> None:
        """Redraws the table each second; says in a log every few minutes how far the points are."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (REFRESH if self._terminal else LOG_EVERY)
        if self._terminal:
            self._clear()
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in self._table(running, height - 2)]
            print("\n".join(lines), file=sys.stderr, flush=True)
            self._drawn = len(lines)
            return
        for name in running:
            progress = self._progress(name)
            if progress is not None:
                left = f", {metrics.duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
                self._say(f"{name} step {progress.step}/{self._rows[name].steps}{_losses(progress)}{left}")
        self._say(self._summary(running))

    def close(self) -> None:
        """Takes the table away."""
        self._clear()

    def _say(self, line: str) -> None:
        self._clear()
        print(line, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}A\x1b[J", end="", file=sys.stderr)  # up so many lines, and all below is erased
        self._drawn = 0

    def _table(self, running: Collection[str], height: int) -> list[str]:
        """The points, or where they are too many those that run, and a line about all of them."""
        shown = list(self._rows) if len(self._rows) + 2 <= height else list(running)
        width = max([len("point"), *map(len, shown)])
        lines = [f"{'point':<{width}}  {'status':<12}{'step':>16}{'loss':>9}{'EMA':>9}{'left':>9}"]
        for name in shown[: height - 2]:
            progress = self._progress(name)
            cells = ["", "", "", ""]
            if progress is not None:
                left = progress.seconds_left if name in running else None
                cells = [
                    f"{progress.step:,}/{self._rows[name].steps:,}",
                    "-" if progress.loss is None else f"{progress.loss:.4f}",
                    "-" if progress.ema_loss is None else f"{progress.ema_loss:.4f}",
                    "" if left is None else metrics.duration(left),
                ]
            status = self._status(name, running)
            lines.append(f"{name:<{width}}  {status:<12}{cells[0]:>16}{cells[1]:>9}{cells[2]:>9}{cells[3]:>9}")
        return [*lines, self._summary(running)]

    def _status(self, name: str, running: Collection[str]) -> str:
        found = None if name in running else outcome.read(self._workdir / name)
        return "running" if name in running else found.status if found is not None else "waiting"

    def _summary(self, running: Collection[str]) -> str:
        """How many are where, and how long it takes until all are done, by the FLOPs/s of those that ran."""
        states = {name: self._status(name, running) for name in self._rows}
        counts = collections.Counter(states.values())
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        seconds, flops, left, unknown = 0.0, 0.0, 0.0, 0.0
        for name, row in self._rows.items():
            if states[name] == "done":
                found = outcome.read(self._workdir / name)
                seconds += (found.numbers.seconds if found is not None else None) or 0.0
                flops += row.flops
            elif states[name] in ("running", "waiting"):
                progress = self._progress(name)
                share = 1.0 if progress is None else (row.steps - progress.step) / row.steps
                if progress is not None and progress.seconds_left is not None and states[name] == "running":
                    left, seconds = left + progress.seconds_left, seconds + progress.seconds_left
                    flops += share * row.flops
                else:
                    unknown += share * row.flops
        if unknown and not flops:
            return text
        left += unknown * seconds / flops if unknown else 0.0
        return f"{text}; about {metrics.duration(left / self._jobs)} left" if left else text

    def _progress(self, name: str) -> _Progress | None:
        """By the last row of the point's metrics; None before there is any."""
        path = self._workdir / name / "metrics.jsonl"
        if not path.is_file():  # not yet; what is damaged is for the point's own process to say
            return None
        written = path.stat().st_mtime_ns
        if name not in self._seen or self._seen[name][0] != written:
            self._seen[name] = written, _last_row(path)
        row = self._seen[name][1]
        if row is None:
            return None
        now, step = time.monotonic(), row["step"]
        since, first = self._first.setdefault(name, (now, step))
        left = (self._rows[name].steps - step) * (now - since) / (step - first) if step > first else None
        return _Progress(step, row["loss"], row["ema_loss"], left)


def table(rows: Sequence[sweep_results.Row]) -> str:
    """Rows of sweep.json as aligned text."""
    losses = ("loss", f"EMA({sweep_results.EMA_ALPHA})", "validation")
    heads = ("point", "status", *losses, "tokens/s", "time", "dropped", "imbalance")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        losses = (_number(value, ".4f") for value in (row.loss, row.ema_loss, row.validation_loss))
        time = "-" if row.seconds is None else metrics.duration(row.seconds)
        speed, dropped = _number(row.tokens_per_second, ",.0f"), _number(row.dropped, ".1%")
        lines.append((row.name, row.status, *losses, speed, time, dropped, _number(row.imbalance, ".2f")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{line[0]:<{widths[0]}}", f"{line[1]:<{widths[1]}}"]
            + [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)]
        )
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _losses(progress: _Progress | None) -> str:
    if progress is None or progress.loss is None or progress.ema_loss is None:
        return ""
    return f", loss {progress.loss:.4f}, EMA {progress.ema_loss:.4f}"


def _last_row(path: pathlib.Path) -> dict[str, Any] | None:
    """The last whole row of a file of JSON lines."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None
