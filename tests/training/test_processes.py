"""Laws of a run of several processes: they find one another, miss one another by name, and do what one would do."""

import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
import test_trainer
import tiny

from moejax import cli
from moejax import config as config_lib
from moejax.training import peers, processes, trainer

HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--process_id=1"], "--coordinator and --num_processes must be given, too"),
        (["--coordinator=a:1", "--num_processes=2"], "--process_id must be given, too"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "--coordinator=a must be HOST:PORT"),
        (["--coordinator=a:x", "--num_processes=2", "--process_id=0"], "--coordinator=a:x must be HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2 must lie in [0, --num_proc"),
        (["--coordinator=a:1", "--num_processes=0", "--process_id=0"], "--num_processes=0 must be 1 or more"),
        (["--start_timeout=0"], "--start_timeout=0 must be above 0 seconds"),
    ],
)
def test_a_place_that_cannot_be_is_refused_in_one_line(flags, message, tmp_path, capsys):
    arguments = ["train", f"--config={tiny.__file__}:{tmp_path}", f"--workdir={tmp_path / 'run'}"]
    assert cli.run([*arguments, *flags]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"moejax: {message}")
    assert line.count("\n") == 1


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (SLURM, peers.Place("node03:61441", 2, 1)),  # one task a host takes all of its devices
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, peers.Place("node03:61441", 4, 1, (1,))),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, peers.Place("10.0.0.1:61441", 4, 3, (1,))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job of several
    ],
)
def test_the_cluster_says_where_this_process_stands_and_a_lone_one_stays_alone(environment, place, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.find(None, None, None) == place
    assert processes.find(None, 1, None) is None  # whatever the cluster


def test_slurm_says_on_which_hosts_the_processes_are(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[03-04]" ] && printf "node03\\nnode04\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in (SLURM | {"SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}).items():
        monkeypatch.setenv(name, value)
    place = processes.find(None, None, None)
    assert place is not None
    assert place.hosts == ("node03", "node03", "node04", "node04")
    monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
    place = processes.find(None, None, None)
    assert place is not None
    assert place.hosts == ()


def test_a_pod_of_an_indexed_job_is_not_trained_alone_in_silence(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(config_lib.ConfigError, match=r"needs the package kubernetes; .* --num_processes=1"):
        processes.find(None, None, None)


def meet(*places: peers.Place, settings: dict | None = None, time_limit: float = 2.0) -> list:
    """What each place's `peers.meet` returns or raises, all at once; settings: of the last one."""
    results: list = [None] * len(places)

    def one(number: int) -> None:
        own = settings if settings and number == len(places) - 1 else {"a": 1}
        try:
            results[number] = peers.meet(places[number], own, time_limit=time_limit, say=lambda _: None)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, peers.Peers):
            result.close()
    return results


def test_all_processes_know_all_hosts_and_what_did_not_come_is_named():
    address = f"127.0.0.1:{free_port()}"
    here = meet(*(peers.Place(address, 3, number) for number in (0, 1, 2)))
    assert [found.hosts for found in here] == [dict.fromkeys(range(3), HOST)] * 3
    missed = meet(*(peers.Place(address, 4, number) for number in (0, 2)), time_limit=1)
    for error in missed:
        assert isinstance(error, peers.PeerError)
        assert str(error).startswith(f"processes 1, 3 of 4 did not come within 1 s; here are 0 on {HOST}, 2 on {HOST};")
    (missed,) = meet(peers.Place(address, 2, 0, hosts=("node03", "node04")), time_limit=1)
    assert str(missed).startswith("process 1 on node04 of 2 did not come within 1 s; ")


def test_processes_that_do_not_fit_together_are_refused():
    address = f"127.0.0.1:{free_port()}"
    for error in meet(peers.Place(address, 2, 0), peers.Place(address, 2, 1), settings={"a": 2}):
        assert isinstance(error, config_lib.ConfigError)
        assert str(error).startswith(f"process 1 on {HOST} has a=2 and process 0 has a=1; ")
    results = meet(*(peers.Place(address, 3, number) for number in (0, 1, 1)), time_limit=1)
    refused = [error for error in results if isinstance(error, config_lib.ConfigError)]
    assert [str(error).partition(";")[0] for error in refused] == [f"--process_id=1 is taken by a process on {HOST}"]
    with socket.create_server(("", free_port())) as other:
        place = peers.Place(f"127.0.0.1:{other.getsockname()[1]}", 2, 0)
        (taken,) = meet(place)
        assert isinstance(taken, config_lib.ConfigError)
        assert "cannot listen on port" in str(taken)
    (unreached,) = meet(peers.Place(address, 2, 1), time_limit=0.5)
    assert isinstance(unreached, config_lib.ConfigError)
    assert str(unreached).startswith(f"coordinator={address} was not reached within 0.5 s (Connection refused); ")


STEPS = 20
SHORT = f"--config.training.num_steps={STEPS}"


class Run:
    """Two processes of two devices each; their output is kept, and none outlives the test."""

    def __init__(self, corpus: pathlib.Path, workdir: pathlib.Path, **mesh: int):
        self.logs = [workdir.with_suffix(f".{number}") for number in range(2)]
        address = f"127.0.0.1:{free_port()}"
        flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"  # the last one counts
        overrides = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        self.processes = []
        for number, log in enumerate(self.logs):
            place = [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}"]
            command = test_trainer.command(corpus, workdir, *place, *overrides, SHORT)
            with log.open("w") as file:
                environment = {**os.environ, "XLA_FLAGS": flags}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, number: int) -> str:
        return self.logs[number].read_text()

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                pytest.fail(self.log(0) + self.log(1))
            time.sleep(0.01)


def test_a_run_that_loses_a_process_and_moves_over_processes_and_meshes_has_the_losses_of_a_straight_run(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = test_trainer.settings(corpus)
    config.training.num_steps = STEPS
    config.mesh = config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    trainer.train(config, straight)
    checkpoints = workdir / "checkpoints"

    def rows() -> int:
        path = workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    with Run(corpus, workdir, data=2, fsdp=1, expert=2) as run:
        run.wait_for(lambda: rows() >= 6 and (checkpoints / "3").exists())
        run.processes[0].send_signal(signal.SIGKILL)
        since = time.monotonic()
        assert run.processes[1].wait(timeout=90) == 1
        assert time.monotonic() - since < 90
        assert f"moejax: process 0 on {HOST} is lost: its connection has closed;" in run.log(1)
    with Run(corpus, workdir, data=1, fsdp=4) as run:
        run.wait_for(lambda: "resuming from step" in run.log(0))  # the step is yet to be compiled
        run.processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=90) for process in run.processes] == [0, 0]
        assert "stopped by a signal after step " in run.log(0)
        assert "step " not in run.log(1)  # process 0 alone speaks
    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert 3 < saved == rows() < STEPS
    config.mesh = config_lib.MeshConfig(data=1, expert=4, tensor=2)
    trainer.train(config, workdir)

    for ours, expected in zip(test_trainer.rows(workdir), test_trainer.rows(straight), strict=True):
        assert ours.keys() == expected.keys()
        for name in ("loss", "validation_loss", "grad_norm", "ema_loss", "tokens"):
            if name in expected:
                assert ours[name] == pytest.approx(expected[name], rel=1e-5)
    config.mesh = config_lib.MeshConfig()  # one device
    final = [test_trainer.final_state(config, folder) for folder in (workdir, straight)]
    for ours, expected in zip(*final, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
