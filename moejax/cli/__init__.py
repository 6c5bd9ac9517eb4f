"""The command `moejax`: one small function a subcommand.

Exit status: 0 done, 1 the run failed, 2 the user's input cannot be; then one line on standard error says what to mend.
Results go to standard output, everything else to standard error.
"""

import os
import sys
import traceback

from moejax import config as config_lib
from moejax.cli import arguments as arguments_lib
from moejax.cli.overrides import read_config
from moejax.training import processes

__all__ = ["main", "read_config", "run"]


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand and exits."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax is imported, which reads it
    try:
        status = run(sys.argv[1:] if argv is None else argv)
    except Exception:
        traceback.print_exc()
        status = 1
    processes.leave(status)
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Runs a subcommand; returns the exit status."""
    try:
        arguments, rest = arguments_lib.parse(argv)
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
