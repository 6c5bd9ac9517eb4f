"""The training run, read from top to bottom."""

import collections
import math
import os
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from moejax import config as config_lib
from moejax import partition
from moejax.data import pipeline
from moejax.models import model as model_lib
from moejax.rules import model as model_rules
from moejax.training import checkpoint, evaluate, folder, initial, metrics, processes
from moejax.training import probe as probe_lib
from moejax.training import state as state_lib


class TrainingError(RuntimeError):
    """The run cannot go on; the message is one line that says at which step, why, and what is safe."""


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can end between two steps. A second one ends at once.

    Of several processes all stop after the same step, whichever got the signal: jax's runtime has taken SIGTERM for
    itself, and agrees on the step; SIGINT becomes SIGTERM.
    """

    def __init__(self):
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._together = jax.process_count() > 1

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after(self, step: int) -> str | None:
        """What stops the run after this step, if anything does. Asked once a step, which are counted from 1 here.

        From 1 also where a run goes on: processes that have not asked yet count as at 0 in jax's agreement.
        """
        if self._together:
            return "a signal" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._signal

    def _note(self, number: int, _: object) -> None:
        self._signal = signal.Signals(number).name
        signal.signal(number, self._previous[number])
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)


def train(config: config_lib.Config, workdir: pathlib.Path) -> int:
    """Trains to training.num_steps, or goes on from the newest checkpoint in workdir; see `initial` for a new run.

    Writes config.json, data.json, tokenizer.json, metrics.jsonl, TensorBoard events and checkpoints/ into workdir.
    Where jax runs several processes, each calls this; process 0 alone writes, but for each one's part of a checkpoint.

    Returns:
      The step that the run has come to: below training.num_steps where a signal has stopped it.

    Raises:
      ConfigError: a setting that cannot be, or a workdir of another model; nothing on disk has changed.
      TrainingError: the loss or the gradient is no longer finite.
    """
    changed = folder.check(config, workdir)
    model_rules.validate_trainable(config)
    mesh = partition.make_mesh(config.mesh)
    partition.check_batch(config, mesh)
    partition.check_platform(config, mesh)
    if not folder.has_checkpoints(workdir):
        initial.check(config)
    abstract = state_lib.abstract(config, mesh)
    data = pipeline.load(config.data, initial.tokenizer(config, workdir))
    folder.check_vocabulary(config, data.tokenizer)
    folder.check_corpus(data, workdir)
    metrics.say(describe(config, data))
    metrics.say(partition.describe(mesh))
    for note in notes(config, data):
        metrics.say(note)

    # Resume wins over initialisation. The folder is written to only once there is something to go on from.
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint)
    restored = checkpoints.restore(abstract, on_corrupt=folder.report_corrupt(workdir))
    if restored is None:
        state, start = initial.create(config, mesh, data), 0
    else:
        state, start = restored
        metrics.say(f"resuming from step {start} in {workdir}{''.join(f', {change}' for change in changed)}")
        if start >= config.training.num_steps:
            metrics.say(f"all {config.training.num_steps} steps are done; raise training.num_steps to train on")
    if jax.process_index() == 0:
        folder.describe(config, data, workdir)
    processes.wait_for_all("described")
    folder.check_shared(data, workdir)

    try:
        with Stop() as stop:
            return run_steps(config, mesh, data, state, start, checkpoints, workdir, stop)
    finally:
        checkpoints.close()


def run_steps(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    data: pipeline.Data,
    state: state_lib.TrainState,
    start: int,
    checkpoints: checkpoint.Checkpoints,
    workdir: pathlib.Path,
    stop: Stop,
) -> int:
    """The loop: dispatches step n, then reads the numbers of step n - 1 while n runs. Returns the last step done."""
    num_steps = config.training.num_steps
    train_step = processes.in_step(state_lib.make_train_step(config, mesh))
    eval_step = processes.in_step(evaluate.make_eval_step(mesh))
    writes = jax.process_index() == 0
    writer = metrics.MetricsWriter(workdir, step=start) if writes else metrics.Writer()
    console = metrics.Console(num_steps=num_steps, step=start, log_every=config.training.log_every)
    log = RowLog(config, writer, console, start)
    probe = probe_lib.Probe(workdir, step=start) if writes else None
    parts = partition.parts_of_batch(mesh, jax.process_index())
    batches = pipeline.train_batches(data, config.data, start, parts=parts, num_parts=partition.num_batch_shards(mesh))
    try:
        for step in range(start + 1, num_steps + 1):
            # a copy: a worker's arrays lie in memory that it takes back, and jax on CPU would keep them without copying
            batch = partition.place_batch(mesh, parts, jax.tree.map(np.array, next(batches)))
            state, step_metrics = train_step(state, batch)
            log.finish_pending(checkpoints)
            log.pending = (step, step_metrics)

            if step % config.training.eval_every == 0 or step == num_steps:
                held_out = pipeline.validation_batches(data, config.data, config.training.eval_batches)
                evaluation = evaluate.evaluate(state.model, eval_step, held_out, mesh)
                log.evaluation["validation_loss"] = evaluation["loss"]
                if probe and "preferred_ML" in evaluation:
                    churn_M = probe.churn(evaluation["preferred_ML"], step)
                    log.evaluation |= {} if churn_M is None else {"churn": churn_M}
            stopped_by = stop.after(step - start)  # read once: a signal may come between any two lines
            if step % config.checkpoint.every == 0 or step == num_steps or stopped_by:
                log.finish_pending(checkpoints)  # a checkpoint is never ahead of metrics.jsonl, nor past a NaN
                writer.flush()
                checkpoints.save(state, step)
            if stopped_by and step < num_steps:
                checkpoints.wait()
                console.say(f"stopped by {stopped_by} after step {step}, saved; run the same command to go on")
                return step
        return max(start, num_steps)
    finally:
        console.close()
        writer.close()
        batches.close()


class RowLog:
    """Turns the device's numbers of a step into its row of metrics.jsonl and the console, one step late."""

    def __init__(self, config: config_lib.Config, writer: metrics.Writer, console: metrics.Console, start: int):
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.evaluation: dict[str, Any] = {}  # of the pending step
        self._config, self._writer, self._console = config, writer, console
        last = writer.last or {}
        self._tokens: int = last.get("tokens", 0)
        self._ema: float | None = last.get("ema_loss")
        self._time = time.perf_counter()
        self._compiling = True
        # (seconds, tokens) of recent steps, for a speed and a time left that one slow step does not upset
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=20)

    def finish_pending(self, checkpoints: checkpoint.Checkpoints) -> None:
        """Waits for the pending step, if any, and writes its row; raises TrainingError if it is not finite."""
        if self.pending is None:
            return
        step, step_metrics = self.pending
        self.pending = None
        values = jax.tree.map(np.asarray, jax.device_get(step_metrics))
        now = time.perf_counter()
        seconds, self._time = now - self._time, now
        loss, grad_norm, tokens = (float(values[name]) for name in ("loss", "grad_norm", "tokens"))
        self._tokens += int(tokens)
        alpha = self._config.training.ema_alpha
        self._ema = loss if self._ema is None else (1 - alpha) * self._ema + alpha * loss
        row: dict[str, Any] = {
            "step": step,
            "tokens": self._tokens,
            "loss": loss,
            "ema_loss": self._ema,
            "learning_rate": float(values["learning_rate"]),
            "grad_norm": grad_norm,
        }
        if "vocabulary_z_loss" in values:
            row["vocabulary_z_loss"] = float(values["vocabulary_z_loss"])
        row |= self.evaluation
        self.evaluation = {}
        row |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        row |= {name: value if value.ndim else float(value) for name, value in values.get("routing", {}).items()}
        self._writer.write(row)

        if not self._compiling:  # the first step's time is mostly the compiler's
            self._recent.append((seconds, tokens))
        self._compiling = False
        elapsed = sum(second for second, _ in self._recent) or seconds
        per_step = elapsed / max(1, len(self._recent))
        speed = sum(count for _, count in self._recent) / elapsed if self._recent else tokens / seconds
        left = (self._config.training.num_steps - step) * per_step
        self._console.show(row, tokens_per_second=speed, seconds_left=left)

        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._writer.flush()
            checkpoints.wait()
            good = checkpoints.steps()
            what = f"loss {loss}, gradient norm {grad_norm}"
            safe = f"the last good checkpoint is step {good[-1]}" if good else "no checkpoint was saved before it"
            raise TrainingError(
                f"step {step} is not finite ({what}); {safe}; lower optimizer.learning_rate or optimizer.clip_norm"
            )


def notes(config: config_lib.Config, data: pipeline.Data) -> list[str]:
    """What a user should know of the router before the run, a line each."""
    if not config.model.has_experts:
        return []
    c, found = config.model.moe, []
    is_dropless = c.is_dropless(1.0, full_capacity=1.0)  # where the factor would drop something
    if is_dropless and (c.capacity_factor or c.eval_capacity_factor):
        found.append(f"note: router={c.router} drops no token here; model.moe.capacity_factor does not apply")
    looks_ahead = [
        phase
        for phase, train, factor in (
            ("training", True, c.capacity_factor),
            ("evaluation", False, c.eval_capacity_factor),
        )
        if c.slot_order(train) == "choices" and factor and c.num_choices > 1 and not is_dropless
    ]
    if looks_ahead:
        found.append(
            f"note: in {' and '.join(looks_ahead)} first choices get slots before second ones, as in GShard: whether a "
            "second choice is dropped depends on later tokens; model.moe.capacity_order=tokens does not look ahead"
        )
    if c.router == "sinkhorn":
        found.append(
            "note: router=sinkhorn balances over all tokens of a group in training, later ones included; "
            "evaluation and generation choose by the token alone"
        )
    if c.router == "label":
        names = ", ".join(f"{name} to {i % c.num_experts}" for i, name in enumerate(data.labels[:24]))
        found.append(f"note: {len(data.labels)} labels over {c.num_experts} experts: {names}")
    return found


def describe(config: config_lib.Config, data: pipeline.Data) -> str:
    """One line: what is trained on what."""
    params = nnx.state(model_lib.abstract(config.model), nnx.Param)
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    count = f", {data.num_tokens:,} tokens" if data.num_tokens is not None else ""
    left_out = f"; {data.num_left_out:,} blank or unreadable left out" if data.num_left_out else ""
    left_out += f"; {data.num_cut:,} inputs over data.seq_length={config.data.seq_length} cut" if data.num_cut else ""
    return (
        f"{num_params:,} parameters; {config.data.source}: "
        f"{data.num_documents:,} documents{count} to train on, {len(data.validation):,} documents, "
        f"{data.validation.num_targets:,} tokens held out{left_out}; packing {config.data.packing}; "
        f"tokenizer {data.tokenizer.name} of {data.tokenizer.vocab_size:,}"
    )
