"""What the launchers share: a command line, `moejax train` as every host runs it, refusals in one line, TPU slices.

    scripts/launch_X.py --name=NAME --workdir=DIR [options] -- --config=FILE [--config.a.b=v ...]

What follows `--` goes to `moejax train` as it is. A run is started by the same command everywhere, and the same command
resumes it. Exit status: 0 launched, 1 a tool failed, 2 the input cannot be. Standard library only: a launcher runs
where moejax is not installed.
"""

import argparse
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent


class LaunchError(ValueError):
    """What was asked for cannot be; the message is one line with what to do instead."""


class Parser(argparse.ArgumentParser):
    """Takes what every launcher takes, and refuses in one line."""

    def __init__(self, doc: str | None):
        super().__init__(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, usage="%(prog)s"
        )
        self.usage = f"{self.prog} --name=NAME --workdir=DIR [options] -- --config=FILE [--config.a.b=VALUE ...]"
        self.add_argument("--name", required=True, help="a-z, 0-9 and '-'")
        self.add_argument(
            "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable; may be repeated"
        )
        self.add_argument("--setup", default="", metavar="COMMAND", help="shell command that every host runs before")
        self.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}; see --help")

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The launcher's own options, with env as pairs; and what follows `--`, for moejax train."""
        argv = list(argv)
        cut = argv.index("--") if "--" in argv else len(argv)
        options = self.parse_args(argv[:cut])
        check_name("--name", options.name)
        pairs = [text.partition("=") for text in options.env]
        for text, (name, equals, _) in zip(options.env, pairs, strict=True):
            if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
                raise LaunchError(f"--env={text} must be NAME=VALUE, the name of letters, digits and '_'; mend it")
        options.env = [(name, value) for name, _, value in pairs]
        return options, argv[cut + 1 :]


def check_name(option: str, name: str, longest: int = 40) -> None:
    """Refuses what is no label of RFC 1035, which a JobSet's name must be; by default as short as xpk wants it."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise LaunchError(
            f"{option}={name} must be of a-z, 0-9 and '-', begin with a letter and not end with '-'; mend it"
        )
    if len(name) > longest:
        raise LaunchError(f"{option}={name} has {len(name)} characters, and at most {longest} fit here; shorten it")


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise LaunchError(f"{option}={value} must be {least} or more; change it")


def train_command(workdir: str, arguments: Sequence[str], executable: str = "moejax") -> list[str]:
    """`moejax train` in workdir with the arguments that followed `--`."""
    if not any(argument.partition("=")[0] == "--config" for argument in arguments):
        raise LaunchError("no --config for moejax train; put its arguments after --, e.g. -- --config=configs/c4.py")
    if any(argument.partition("=")[0] == "--workdir" for argument in arguments):
        raise LaunchError("--workdir stands after --; put it before, where the launcher sees it")
    return [executable, "train", f"--workdir={workdir}", *arguments]


class Place(NamedTuple):
    """Where a run's folder is: a path on every host, and the bucket that is mounted for it, if it lies in one."""

    path: str
    bucket: str | None
    mount: str | None  # the bucket's folder, the same on every kind of machine

    # Without the limit Cloud Storage FUSE renames no folder, and a finished checkpoint is a folder that is renamed.
    OPTIONS = ("implicit-dirs", "rename-dir-limit=200000")


def place(workdir: str) -> Place:
    """Of gs://BUCKET/PATH or of an absolute path on a file system that all hosts share."""
    if found := re.fullmatch(r"gs://([a-z0-9][-_.a-z0-9]{1,220}[a-z0-9])/(.*[^/])/*", workdir):
        bucket, path = found.groups()
        return Place(f"/mnt/gcs/{bucket}/{path}", bucket, f"/mnt/gcs/{bucket}")
    if workdir.startswith("/") and workdir.strip("/"):
        return Place(workdir, None, None)
    raise LaunchError(
        f"--workdir={workdir} must be gs://BUCKET/PATH or an absolute path that all hosts share; change it"
    )


class Source(NamedTuple):
    """A commit of a git repository, to be fetched by every host."""

    repository: str
    ref: str

    def fetch(self, folder: str) -> str:
        """Shell that leaves the commit in folder; a branch, a tag or a full hash, without its history."""
        repository, ref, folder = map(shlex.quote, (self.repository, self.ref, folder))
        return (
            f"rm -rf {folder} && git init --quiet {folder} "
            f"&& git -C {folder} fetch --quiet --depth=1 {repository} {ref} "
            f"&& git -C {folder} checkout --quiet FETCH_HEAD"
        )


def takes_source(parser: Parser) -> None:
    parser.add_argument("--ref", metavar="REF", help="branch, tag or full hash of moejax to install on every host")
    parser.add_argument("--repository", metavar="URL", help="where --ref is (default: this checkout's origin)")


def source(options: argparse.Namespace) -> Source | None:
    """Of --ref and --repository; None without --ref."""
    if options.ref is None:
        if options.repository:
            raise LaunchError(f"--repository={options.repository} has no --ref; name a branch, a tag or a full hash")
        return None
    repository = options.repository
    if repository is None:
        asked = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
        found = subprocess.run(asked, capture_output=True, text=True) if shutil.which("git") else None
        if found is None or found.returncode:
            raise LaunchError("--ref needs --repository=URL: this checkout has no origin")
        repository = found.stdout.strip()
    return Source(repository, options.ref)


class TpuKind(NamedTuple):
    """How Google names one generation of TPUs."""

    gke: str  # label cloud.google.com/gke-tpu-accelerator
    prefix: str  # of the accelerator type
    cores: int  # TensorCores a chip, which the accelerator type counts; those with one have slices in two dims
    runtime: str | None  # software version of a TPU VM; None: Compute Engine or GKE alone makes them
    most: int  # chips of the largest slice


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, cloud.google.com/tpu/docs/runtimes, and xpk's
# core/system_characteristics.py for the accelerator types; slices as moejax/analysis/chips.py has them. A host has 4
# chips, and 1 where the slice is one chip: of v5e and v6e, 2x4 is taken as two hosts of 4, not as one of 8.
TPUS = {
    "v4": TpuKind("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base", 4096),
    "v5e": TpuKind("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 256),
    "v5p": TpuKind("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 6144),
    "v6e": TpuKind("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 256),
    "tpu7x": TpuKind("tpu7x", "tpu7x", 2, None, 9216),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # above them every side is a multiple of 4, the sides ascending


class Slice(NamedTuple):
    """A TPU slice, such as v5p:4x4x4."""

    tpu: TpuKind
    topology: str

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_a_host(self) -> int:
        return min(self.chips, 4)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_a_host

    @property
    def accelerator_type(self) -> str:
        """As Compute Engine and xpk name it: v5p-128 for v5p:4x4x4."""
        return f"{self.tpu.prefix}-{self.chips * self.tpu.cores}"


def tpu_slice(option: str, text: str) -> Slice:
    """Of KIND:TOPOLOGY, spelled as for `moejax plan --topology`."""
    kind, _, topology = text.partition(":")
    if kind not in TPUS:
        raise LaunchError(f"{option}={text} must be KIND:TOPOLOGY with KIND one of {', '.join(TPUS)}; e.g. v5p:4x4x4")
    tpu = TPUS[kind]
    if tpu.cores == 1:
        if topology not in FLAT:
            raise LaunchError(f"{option}={text}: {kind} has slices of {', '.join(FLAT)}; choose one")
    elif topology not in SMALL_CUBES:
        sides = [int(side) for side in topology.split("x") if side.isdecimal()]
        cube = len(sides) == len(topology.split("x")) == 3 and sides == sorted(sides)
        if not (cube and sides[0] > 0 and not any(side % 4 for side in sides) and math.prod(sides) <= tpu.most):
            raise LaunchError(
                f"{option}={text}: {kind} has slices of {', '.join(SMALL_CUBES)} and AxBxC with A <= B <= C, multiples "
                f"of 4, up to {tpu.most} chips; choose one"
            )
    return Slice(tpu, topology)


def require(tool: str, dry_run: bool) -> None:
    """Refuses a launch without the tool that does it, before anything is done."""
    if not dry_run and shutil.which(tool) is None:
        raise LaunchError(f"{tool} is not on PATH; install it, or add --dry-run to see what it would be given")


def run(command: Sequence[str], *, dry_run: bool, text: str | None = None, folder: str | None = None) -> bool:
    """Runs the command in folder with text as its standard input, or prints it in shell; says whether all is well."""
    if dry_run:
        print(shlex.join(command))
        return True
    status = subprocess.run(command, input=text, text=True, cwd=folder).returncode
    if status:
        print(f"{shlex.join(command[:4])} ... ended with status {status}", file=sys.stderr)
    return status == 0


def main(launch: Callable[[Sequence[str]], bool]) -> NoReturn:
    """Runs a launcher and exits."""
    try:
        sys.exit(0 if launch(sys.argv[1:]) else 1)
    except LaunchError as refusal:
        print(f"{pathlib.Path(sys.argv[0]).name}: {refusal}", file=sys.stderr)
        sys.exit(2)
