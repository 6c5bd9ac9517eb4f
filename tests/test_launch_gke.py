"""A JobSet, or a workload of xpk: its manifest, and what its pods do."""

import shlex
import signal
import subprocess

import job_set
import launches
import pytest
import yaml


@pytest.fixture
def tools(tmp_path):
    return launches.make_tools(tmp_path)


EVERY_OPTION = (
    *("--queue=q", "--spot", "--host-network", "--volume=claim:/data", "--service-account=me", "--env=A=1"),
    *("--namespace=ml", "--setup=true", "--ref=v1", "--repository=https://host/you/moejax.git"),
)


@pytest.mark.parametrize("more", [(), EVERY_OPTION], ids=["plain", "every option"])
def test_the_manifest_is_a_job_set(more):
    manifest = yaml.safe_load(launches.dry(*launches.GKE, "--slices=2", *more))
    job_set.check(manifest)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounts = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert mounts == [volume["name"] for volume in pod["volumes"]]
    assert len(set(mounts)) == len(mounts) == 2 + ("--volume=claim:/data" in more)
    assert (
        subprocess.run(
            ["bash", "-n", "-c", launches.expanded(launches.container(yaml.safe_dump(manifest))["command"][2])]
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("tpu", "accelerator", "hosts", "chips", "xpk"),
    [
        ("v4:2x2x2", "tpu-v4-podslice", 2, 4, "v4-16"),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1, "v5litepod-1"),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4, "v5litepod-256"),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4, "v5p-128"),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4, "v6e-16"),
    ],
)
def test_a_slice_is_a_job_of_a_pod_a_host_with_its_chips(tpu, accelerator, hosts, chips, xpk):
    slices = 2 if hosts > 1 else 1
    slices_job = yaml.safe_load(launches.dry(*launches.GKE, f"--tpu={tpu}", f"--slices={slices}"))["spec"][
        "replicatedJobs"
    ][0]
    job = slices_job["template"]["spec"]
    assert (slices_job["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.partition(":")[2],
    }
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    words = shlex.split(launches.dry(*launches.XPK, f"--tpu={tpu}", f"--slices={slices}"))
    assert {f"--tpu-type={xpk}", f"--num-slices={slices}", "--max-restarts=100"} <= set(words)


@pytest.mark.parametrize("kind", ["jobset", "xpk"])
def test_a_pod_that_is_told_to_end_saves_and_fails_so_that_the_set_starts_again(kind, tools):
    if kind == "jobset":
        command, variables = launches.pod(launches.dry(*launches.GKE, "--setup=true"), tools, WAIT="1")
    else:
        command, variables = launches.xpk_pod(launches.dry(*launches.XPK)), launches.environment(tools, WAIT="1")
        command = ["bash", "-c", command[-1].replace("wait $!", "trap 'kill $!' TERM; wait $!; wait $!")]
    output, status = launches.signalled(command, variables, tools, signal.SIGTERM)
    assert output == "training\nstopped by SIGTERM after step 7, saved\n"
    assert status == 143


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_pod_that_ends_by_itself_has_the_status_of_moejax(status, tools):
    command, variables = launches.pod(launches.dry(*launches.GKE), tools, STATUS=str(status))
    assert subprocess.run(command, env=variables).returncode == status
