"""A pod of TPU VMs: training begins, goes on and ends on every host."""

import launches
import pytest


@pytest.fixture
def tools(tmp_path):
    return launches.make_tools(tmp_path)


def test_a_tpu_pod_trains_on_every_host_until_it_is_stopped(tools, tmp_path):
    launches.cluster(tools, tmp_path)
    variables = launches.environment(tools, WAIT="1")
    start = (*launches.TPU_VM, "--create=v5p:2x2x2", "--workdir=gs://bucket/runs/a", "--python=fake_python")
    begun = launches.launch(*start, env=variables)
    try:
        assert begun.returncode == 0, begun.stderr
        assert begun.stdout.count("runs as process") == 2
        actions = [line.split()[-1] for line in (tmp_path / "gcloud").read_text().splitlines()]
        assert actions == ["create", "scp", "ssh"]
        assert (tmp_path / "host1/moejax/src/moejax/cli").is_dir()
        assert not (tmp_path / "host1/moejax/src/.git").exists()
        fuse = "gcsfuse --implicit-dirs --rename-dir-limit=200000 bucket /mnt/gcs/bucket"
        assert (tmp_path / "mounts").read_text().count(fuse) == 2

        again = launches.launch(*start, env=variables)
        assert again.returncode == 1
        assert again.stderr.count("moejax runs here as process") == 2
        status = launches.launch(*launches.TPU_VM, "--status", train=(), env=variables)
        assert status.stdout.count("runs as process") == status.stdout.count("training") == 2
    finally:
        stopped = launches.launch(*launches.TPU_VM, "--stop", train=(), env=variables)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("stopped by SIGTERM after step 7, saved") == 2
    assert launches.launch(*launches.TPU_VM, "--status", train=(), env=variables).stdout.count("does not run") == 2
    assert len(launches.calls(tools)) == 2


def test_a_host_where_training_ends_at_once_says_why(tools, tmp_path):
    launches.cluster(tools, tmp_path)
    done = launches.launch(
        *launches.TPU_VM, "--workdir=/shared/a", "--python=fake_python", env=launches.environment(tools, STATUS="2")
    )
    assert done.returncode == 1
    assert done.stderr.count("training\n") == done.stderr.count("moejax train has ended; see ~/moejax/log") == 2
