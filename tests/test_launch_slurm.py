"""A job on GPUs under SLURM: what it asks for, and what it does near its limit."""

import shlex
import signal
import subprocess

import launches
import pytest


@pytest.fixture
def tools(tmp_path):
    return launches.make_tools(tmp_path)


def test_the_batch_script_asks_slurm_for_one_process_a_gpu_that_sees_all_gpus_of_its_node():
    script = launches.dry(
        *launches.SLURM, "--gpu-type=h100", "--partition=gpu", "--sbatch=--comment=two words", "--srun=--mpi=none"
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    header = [word for line in script.splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)[1:]]
    assert set(header) >= {
        *("--job-name=a", "--nodes=2", "--ntasks-per-node=8", "--gres=gpu:h100:8", "--cpus-per-task=8", "--requeue"),
        *("--time=2-12", "--signal=B:USR1@180", "--output=/shared/a b/slurm-%j.log", "--open-mode=append"),
        *("--partition=gpu", "--comment=two words"),
    }
    step = shlex.split(script[script.index("\nsrun") :].partition("&")[0])
    assert {"--gpu-bind=none", "--cpus-per-task=8", "--mpi=none"} <= set(step)
    assert not any(word.startswith(("--gpus-per-task", "--ntasks")) for word in step)


def test_a_job_near_its_limit_saves_and_queues_itself_again(tools, tmp_path):
    launches.slurm_tools(tools, tmp_path)
    script = launches.executable(tmp_path / "job.sh", launches.dry(*launches.SLURM, "--moejax=moejax"))
    variables = launches.environment(tools, WAIT="1", SLURM_JOB_ID="7")
    output, _ = launches.signalled([script], variables, tools, signal.SIGUSR1)  # what --signal=B:USR1@180 sends
    assert output == "training\nstopped by SIGTERM after step 7, saved\nthe time limit was near: queued again\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_has_the_status_of_moejax_and_stays_out_of_the_queue(status, tools, tmp_path):
    launches.slurm_tools(tools, tmp_path)
    script = launches.dry(*launches.SLURM, "--moejax=moejax")
    assert subprocess.run(
        ["bash"], input=script, env=launches.environment(tools, STATUS=str(status)), text=True
    ).returncode == (status)
    assert not (tmp_path / "scontrol").exists()
