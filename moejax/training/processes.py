"""A run of several processes: how this one finds its place among them, and how they start and end together.

jax's distributed runtime does the work; `peers` says who is missing. Imports jax only where it is needed, so that a
mistake in the arguments is answered at once.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from moejax import config as config_lib
from moejax.config import plain
from moejax.training import peers

HEARTBEAT = 80  # seconds after which jax gives up a silent process: later than peers.SILENCE, which says who it is
LONGEST_WAIT = 3600  # seconds; a process that is lost meanwhile is noticed by the watch
SHUTDOWN = 60  # seconds that jax waits for all to have come to the end
EXPLAINED = 2.0  # seconds in which the watch has said whom a failed collective waited for

_peers: peers.Peers | None = None  # while this process is one of several


def find(coordinator: str | None, num_processes: int | None, process_id: int | None) -> peers.Place | None:
    """The place of this process by what the user says, else by what the cluster says; None: it runs alone.

    One process that is told so (`num_processes=1`), or that finds itself alone in its cluster, needs no coordinator.

    Raises:
      ConfigError: the three are not complete, or out of range; or the cluster can't be asked.
    """
    if num_processes == 1 and coordinator is None and process_id in (None, 0):
        return None
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _find_in_cluster()
    if coordinator is None or num_processes is None or process_id is None:
        raise config_lib.ConfigError(
            f"{' and '.join(missing)} must be given, too: a process of several needs --coordinator=HOST:PORT, "
            "--num_processes and --process_id"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise config_lib.ConfigError(
            f"--coordinator={coordinator} must be HOST:PORT, a host that every process reaches and a free port of it"
        )
    if num_processes < 1:
        raise config_lib.ConfigError(f"--num_processes={num_processes} must be 1 or more; change it")
    if not 0 <= process_id < num_processes:
        raise config_lib.ConfigError(
            f"--process_id={process_id} must lie in [0, --num_processes={num_processes}); change it"
        )
    return peers.Place(coordinator, num_processes, process_id) if num_processes > 1 else None


def _find_in_cluster() -> peers.Place | None:
    """The place that TPU pods, GKE, SLURM or Open MPI give this process.

    jax.distributed.initialize() asks the same, but it can't be asked how many there are without connecting, fails where
    there is no cluster, and takes a lone task's first device only. Hence the private module, here and nowhere else.
    """
    from jax._src import clusters

    in_indexed_job = "JOB_COMPLETION_INDEX" in os.environ  # of Kubernetes
    alone = "or --num_processes=1 to train alone"
    try:
        for cluster in clusters.ClusterEnv._cluster_types:
            if cluster is clusters.K8sCluster and not (in_indexed_job and importlib.util.find_spec("kubernetes")):
                continue  # any pod looks like a cluster, a notebook's too
            if cluster.opt_in_only_method or not cluster.is_env_present():
                continue
            num_processes = cluster.get_process_count()
            if num_processes == 1:
                return None
            coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
                timeout_secs=60, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
            devices, hosts = _local_devices(cluster), _hosts(cluster, num_processes)
            return peers.Place(coordinator, num_processes, cluster.get_process_id(), devices, hosts)
    except Exception as error:  # metadata servers and environments fail in many ways
        raise config_lib.ConfigError(
            f"the other processes of this cluster can't be found ({' '.join(str(error).split())[:200]}); pass "
            f"--coordinator, --num_processes and --process_id, {alone}"
        ) from error
    if in_indexed_job:
        raise config_lib.ConfigError(
            "this is a pod of an indexed Kubernetes job, and finding the others needs the package kubernetes; pip "
            f"install 'jax[k8s]', or pass --coordinator, --num_processes and --process_id, {alone}"
        )
    return None


def _local_devices(cluster: Any) -> tuple[int, ...] | None:
    """As in jax the tasks of SLURM and Open MPI take a GPU each, but one that has its host for itself takes all."""
    tasks = os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    local = cluster.get_local_process_id()
    is_alone = tasks[0] == os.environ.get("SLURM_STEP_NUM_NODES", "") or tasks[1] == "1"
    return None if local is None or is_alone or "JAX_LOCAL_DEVICE_IDS" in os.environ else (local,)


def _hosts(cluster: Any, num_processes: int) -> tuple[str, ...]:
    """The hosts of processes 0, 1, ..., to name one that does not come: a TPU slice and SLURM know them."""
    nodes: list[str] = []
    if hasattr(cluster, "_get_worker_list_in_slice"):
        nodes = cluster._get_worker_list_in_slice()
    elif os.environ.get("SLURM_DISTRIBUTION", "block") == "block" and "SLURM_STEP_NODELIST" in os.environ:
        with contextlib.suppress(OSError):  # no scontrol inside a container
            command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
            nodes = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not nodes or num_processes % len(nodes):
        return ()
    return tuple(node for node in nodes for _ in range(num_processes // len(nodes)))


@contextlib.contextmanager
def joined(place: peers.Place | None, config: config_lib.Config, *, start_timeout: float) -> Iterator[None]:
    """While this is open the process is one of several under jax's distributed runtime; with None it stays alone.

    Inside, the process ends with status 1 and a line as soon as another one is lost. One that fails inside calls
    `leave`.

    Raises:
      ConfigError: the coordinator can't be reached, or the processes don't fit together.
      peers.PeerError: some did not come within start_timeout seconds.
    """
    global _peers
    if place is None:
        yield
        return
    settings = {"jax": importlib.metadata.version("jax"), **plain.flatten(config)}
    _peers = peers.meet(place, settings, time_limit=start_timeout, say=say)
    _peers.watch()

    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # we have asked
        initialization_timeout=SHUTDOWN,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    try:
        yield
    except config_lib.ConfigError:
        raise
    except Exception:
        time.sleep(EXPLAINED)  # where a process is lost, the others' collectives fail before the watch has said so
        raise
    _peers.end(0)
    jax.distributed.shutdown()
    _peers.close()
    _peers = None


def leave(status: int) -> None:
    """Ends a process that has failed among several, having told the others; returns in one that is alone.

    An ordinary end would wait for the others in jax's shutdown, and they for this one.
    """
    if _peers is not None:
        _peers.end(status)
        peers.leave(status)


def in_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted function; where there are several processes its first call waits until all have compiled it.

    One may compile for minutes longer than another that finds the program in its cache, and collectives on CPUs give up
    a process that comes 30 s after the first.
    """
    import jax

    if jax.process_count() == 1:
        return step
    is_compiled = False

    @functools.wraps(step)
    def run(*args: Any) -> Any:
        nonlocal is_compiled
        if not is_compiled:
            step.lower(*args).compile()
            wait_for_all("compiled")
            is_compiled = True
        return step(*args)

    return run


def wait_for_all(what: str) -> None:
    """Returns once every process has called this with the same word, as often."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=1000 * LONGEST_WAIT)


def say(line: str) -> None:
    """A line beside what the command prints, at once."""
    print(line, file=sys.stderr, flush=True)
