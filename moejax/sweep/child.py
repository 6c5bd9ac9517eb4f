"""The process that trains one point: python -m moejax.sweep.child FOLDER, started by `runner`.

Its settings are in points.json of the sweep's folder. It ends at once when the runner is gone, so that nobody trains a
point unseen, and leaves result.json. Exit status: DONE (also where a signal stopped the run; then there is no
result.json), FAILED and REFUSED as `moejax train` has them, CRASHED, which might go better the next time, or BUSY.
"""

import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable

from moejax import config as config_lib
from moejax.sweep import folder as folder_lib
from moejax.sweep import lock, outcome

DONE, FAILED, REFUSED = 0, 1, 2
CRASHED, BUSY = 70, 75  # EX_SOFTWARE and EX_TEMPFAIL of sysexits.h

Train = Callable[[config_lib.Config, pathlib.Path], int]


class FailedError(RuntimeError):
    """The run cannot go on, and would come to the same again."""


def main(train: Train, patience: float = lock.PATIENCE) -> None:
    """Trains the point whose folder the command line names, writes its outcome, and exits.

    Args:
      train: of `moejax.training.trainer`, but FailedError in the place of its TrainingError.
      patience: seconds to wait for another process that trains the point.
    """
    threading.Thread(target=_watch_runner, daemon=True).start()
    sys.exit(_run_alone(pathlib.Path(sys.argv[1]), train, patience))


def _run_alone(folder: pathlib.Path, train: Train, patience: float) -> int:
    try:
        with lock.hold(folder, patience):
            return _run(folder, train)
    except lock.HeldError as error:
        print(f"{error} trains {folder.name}", file=sys.stderr)
        return BUSY


def _run(folder: pathlib.Path, train: Train) -> int:
    if outcome.is_done(folder):
        return DONE  # by another runner, a moment ago
    try:
        description = folder_lib.read(folder.parent)
        assert description is not None
        config = description.configs[folder.name]
        step = train(config, folder)
        if step >= config.training.num_steps:
            outcome.write(folder, outcome.Outcome(status="done", numbers=outcome.measure(folder, config)))
        return DONE
    except KeyboardInterrupt:  # before the first step, or after the last
        return DONE
    except config_lib.ConfigError as error:
        reason, status = str(error), REFUSED
    except FailedError as error:
        reason, status = str(error), FAILED
    except Exception as error:
        traceback.print_exc()
        reason, status = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", CRASHED
    print(f"moejax: {reason}", file=sys.stderr)
    outcome.write(folder, outcome.Outcome(status="failed", error=reason))
    return status


def _watch_runner() -> None:
    """Returns never: standard input is a pipe that closes when the runner ends, however it does."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(CRASHED)


def _train(config: config_lib.Config, folder: pathlib.Path) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax is imported, which reads it
    from moejax.training import compiled, trainer

    compiled.keep_programs()
    try:
        return trainer.train(config, folder)
    except trainer.TrainingError as error:
        raise FailedError(str(error)) from error


if __name__ == "__main__":
    main(_train)
