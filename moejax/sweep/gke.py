"""The points of a sweep on TPU slices in GKE: a JobSet a point, by scripts/launch_gke.py.

Its pods run `moejax train` with the point's settings as overrides, so that a point may take several hosts. What they
have come to is in their folders, which `moejax sweep --jobs=0` collects.
"""

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from moejax import config as config_lib
from moejax.config import plain

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "launch_gke.py"


def commands(
    file: str,
    base: config_lib.Config,
    configs: Mapping[str, config_lib.Config],
    workdir: str,
    options: Sequence[str],
) -> dict[str, list[str]]:
    """Of each point, the call of scripts/launch_gke.py that creates its JobSet.

    Args:
      file: FILE[:ARG], which the pods see under the same path.
      base: what its get_config() returns.
      configs: of the points, by name.
      workdir: of the sweep, as the script takes it: gs://BUCKET/PATH, or a path under a volume.
      options: the script's own, --name among them: a point's JobSet is named by it and the point.

    Raises:
      ConfigError: no --name, two points whose JobSets would have one name, or no script.
    """
    if not SCRIPT.is_file():
        raise config_lib.ConfigError(f"--launcher=gke needs {SCRIPT}, which is in a checkout; install with pip -e")
    names = [option.partition("=")[2] for option in options if option.startswith("--name=")]
    if len(names) != 1 or not names[0]:
        raise config_lib.ConfigError("--launcher=gke needs a --name=NAME of the sweep after --, e.g. -- --name=moe")
    rest = [option for option in options if not option.startswith("--name=")]
    found: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for point, config in configs.items():
        name = re.sub(r"[^a-z0-9]+", "-", f"{names[0]}-{point}".lower()).strip("-")
        if owners.setdefault(name, point) != point:
            raise config_lib.ConfigError(
                f"points {owners[name]} and {point} would both be the JobSet {name}; use named()"
            )
        place = [f"--name={name}", f"--workdir={workdir.rstrip('/')}/{point}"]
        found[point] = [sys.executable, str(SCRIPT), *place, *rest, "--", f"--config={file}", *overrides(base, config)]
    return found


def overrides(base: config_lib.Config, config: config_lib.Config) -> list[str]:
    """What makes the config of the base on a command line."""
    return [f"--config.{path}={_written(new)}" for path, _, new in plain.differences(base, config)]


def _written(value: object) -> str:
    return repr(tuple(value)) if isinstance(value, list) else str(value)


def launch(calls: Mapping[str, Sequence[str]], *, dry_run: bool) -> Iterator[str]:
    """Creates the JobSets one after another; yields what the script prints, which for dry_run is the manifest.

    Raises:
      ConfigError: the script refuses one, or kubectl does; it says which were created before.
    """
    created: list[str] = []
    for name, (python, script, *rest) in calls.items():
        command = [python, script, *(["--dry-run"] if dry_run else []), *rest]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            before = f"; created before: {', '.join(created)}" if created and not dry_run else ""
            reason = " ".join(done.stderr.split()) or f"{SCRIPT.name} ended with status {done.returncode}"
            raise config_lib.ConfigError(f"point {name}: {reason}{before}")
        created.append(name)
        yield done.stdout
