"""Trains on TPU slices in GKE: a JobSet, or a workload of xpk.

    python scripts/launch_gke.py --name=moe32 --tpu=v5p:4x4x4 --slices=2 --image=europe-docker.pkg.dev/me/moejax:1 \\
        --workdir=gs://my-bucket/runs/moe32 -- --config=configs/c4.py --config.mesh.expert=16
    python scripts/launch_gke.py ... --xpk=my-cluster --zone=us-east5-a --project=me -- --config=configs/c4.py

--dry-run prints the manifest (scripts/jobset.yaml, filled in), or xpk's command. The image holds moejax with the extra
[tpu], and the config under its working directory; or give --ref, and an image that has Python 3.11, git and pip: then
every host installs that commit first.

The cluster has JobSet 0.6 or later and a node pool a slice, of hosts with 4 chips (1 for 1x1). A workdir in a bucket
is mounted by Cloud Storage FUSE: the pods' service account must be allowed to write there, and the bucket should have
a hierarchical namespace, where a finished checkpoint is renamed in one step. A workdir on a claim: --volume.
"""

import json
import pathlib
import shlex
import string
from collections.abc import Sequence

import launching

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
CHECKOUT = "/tmp/moejax"  # of --ref

# As process 1 of a pod, a shell that passes SIGTERM on and waits. moejax train ends with 0 once it has saved; the pod
# must not: to Kubernetes it would be done, and the run would not start again. In one line, as xpk needs it.
AS_PROCESS_1 = (
    """stopped=; child=; trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM; """
    """{setup}[ -z "$stopped" ] || exit 143; {train} & child=$!; wait "$child"; status=$?; """
    """[ -z "$stopped" ] || {{ wait "$child"; status=$?; [ "$status" != 0 ] || status=143; }}; exit "$status\""""
)
# Options that shape the JobSet, which xpk makes itself.
NOT_WITH_XPK = ("namespace", "context", "queue", "service_account", "volume", "spot", "host_network")


def launch(argv: Sequence[str]) -> bool:
    """Creates the JobSet or the workload; says whether the cluster took it."""
    parser = launching.Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="gs://BUCKET/PATH, or a path under a --volume")
    parser.add_argument("--tpu", required=True, metavar="KIND:TOPOLOGY", help="a slice, e.g. v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="(default 1)")
    parser.add_argument("--image", required=True)
    launching.takes_source(parser)
    parser.add_argument("--max-restarts", type=int, default=100, help="after lost hosts (default 100)")
    parser.add_argument("--grace", type=int, default=600, help="seconds from SIGTERM to SIGKILL (default 600)")
    parser.add_argument("--volume", action="append", default=[], metavar="CLAIM:PATH", help="mount a claim; repeatable")
    parser.add_argument("--service-account", help="Kubernetes service account of the pods")
    parser.add_argument("--namespace", help="(default: default)")
    parser.add_argument("--context", help="of kubectl")
    parser.add_argument("--queue", help="Kueue's local queue")
    parser.add_argument("--spot", action="store_true", help="on Spot nodes")
    parser.add_argument("--host-network", action="store_true", help="faster between slices; not for Autopilot clusters")
    parser.add_argument("--xpk", metavar="CLUSTER", help="through xpk, on a cluster that it made")
    parser.add_argument("--zone", help="for xpk")
    parser.add_argument("--project", help="for xpk")
    options, arguments = parser.parse(argv)
    launching.require("xpk" if options.xpk else "kubectl", options.dry_run)
    tpu = launching.tpu_slice("--tpu", options.tpu)
    launching.at_least("--slices", options.slices, 1)
    launching.at_least("--max-restarts", options.max_restarts, 0)
    launching.at_least("--grace", options.grace, 1)
    if options.slices > 1 and tpu.hosts == 1:
        raise launching.LaunchError(
            f"--slices={options.slices}: GKE joins slices of several hosts; choose a larger --tpu"
        )
    if options.xpk:
        return launching.run(xpk_command(options, tpu, arguments), dry_run=options.dry_run)

    text = manifest(options, tpu, arguments)
    context = [f"--context={options.context}"] if options.context else []
    command = ["kubectl", *context, "create", "--filename=-"]
    if options.dry_run:
        print(f"# {shlex.join(command)} < this")
        print(text, end="")
        return True
    return launching.run(command, dry_run=False, text=text)


def manifest(options, tpu: launching.Slice, arguments: Sequence[str]) -> str:
    """The JobSet, as YAML."""
    for option in ("zone", "project"):
        if getattr(options, option):
            raise launching.LaunchError(f"--{option} goes with --xpk; kubectl's context says where a JobSet goes")
    # a pod is NAME-slice-I-J-xxxxx, of at most 63 characters (JobSet's webhook)
    ending = f"-slice-{options.slices - 1}-{tpu.hosts - 1}-abcde"
    launching.check_name("--name", options.name, 63 - len(ending))
    where = launching.place(options.workdir)
    # a pod has 64 MB of shared memory, too little for grain's workers
    volumes: list[dict] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    annotations = {}
    if where.bucket:
        annotations["gke-gcsfuse/volumes"] = "true"
        attributes = {"bucketName": where.bucket, "mountOptions": ",".join(where.OPTIONS)}
        volumes.append(
            {"name": "workdir", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        )
        mounts.append({"name": "workdir", "mountPath": where.mount})
    for number, text in enumerate(options.volume):
        claim, _, path = text.partition(":")
        if not claim or not path.startswith("/"):
            raise launching.LaunchError(f"--volume={text} must be CLAIM:/PATH; mend it")
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    above = {str(path) for path in pathlib.PurePosixPath(where.path).parents} | {where.path}
    if not where.bucket and not any(text.partition(":")[2].rstrip("/") in above for text in options.volume):
        raise launching.LaunchError(
            f"--workdir={options.workdir} would go with the pod; give gs://BUCKET/PATH, or mount a claim there with "
            "--volume=CLAIM:PATH"
        )
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.tpu.gke,
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    tolerations = []
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    values = {
        "name": options.name,
        "namespace": options.namespace or "default",
        "labels": {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {},
        "max_restarts": options.max_restarts,
        "slices": options.slices,
        "hosts": tpu.hosts,
        "pod_annotations": annotations,
        "grace": options.grace,
        "service_account": options.service_account or "default",
        "node_selector": selector,
        "tolerations": tolerations,
        "host_network": options.host_network,
        "dns_policy": "ClusterFirstWithHostNet" if options.host_network else "ClusterFirst",
        "volumes": volumes,
        "image": options.image,
        "command": ["bash", "-c", literal(pod_script(options, where.path, arguments))],
        "env": [{"name": name, "value": literal(value)} for name, value in options.env],
        "chips": tpu.chips_a_host,
        "volume_mounts": mounts,
    }
    filled = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    lines = TEMPLATE.read_text().splitlines(keepends=True)
    return string.Template("".join(lines[2:])).substitute(filled)  # the first two are about the template


def xpk_command(options, tpu: launching.Slice, arguments: Sequence[str]) -> list[str]:
    """`xpk workload create` for the same run."""
    for option in NOT_WITH_XPK:
        if getattr(options, option):
            raise launching.LaunchError(
                f"--{option.replace('_', '-')} shapes the JobSet, which xpk makes; leave it out"
            )
    where = launching.place(options.workdir)
    if where.bucket:
        raise launching.LaunchError(
            f"--workdir={options.workdir}: xpk mounts storage itself; `xpk storage attach` the bucket, and give the "
            "path where it is mounted"
        )
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in options.env)
    script = exports + pod_script(options, where.path, arguments)
    if "\n" in script:
        raise launching.LaunchError("xpk takes no newline in --env, --setup or an argument; write it in one line")
    place = [f"--{name}={value}" for name in ("zone", "project") if (value := getattr(options, name))]
    return [
        *("xpk", "workload", "create", f"--workload={options.name}", f"--cluster={options.xpk}", *place),
        *(f"--tpu-type={tpu.accelerator_type}", f"--num-slices={options.slices}", f"--docker-image={options.image}"),
        # xpk starts a workload again after the exit statuses 127 to 255, not after 1 or 2
        *(f"--max-restarts={options.max_restarts}", f"--termination-grace-period-seconds={options.grace}"),
        f"--command={literal('exec ' + shlex.join(['bash', '-c', script]))}",
    ]


def pod_script(options, workdir: str, arguments: Sequence[str]) -> str:
    """What a pod runs, in shell."""
    setup = [f"{{ {options.setup}; }}"] if options.setup else []
    if source := launching.source(options):
        install = "python3 -m pip install --quiet --constraint scripts/constraints.txt '.[tpu]'"
        setup += [source.fetch(CHECKOUT), f"cd {CHECKOUT}", install]
    train = shlex.join(launching.train_command(workdir, arguments))
    return AS_PROCESS_1.format(setup=" && ".join(setup) + " || exit 1; " if setup else "", train=train)


def literal(text: str) -> str:
    """Text that Kubernetes, which expands $(NAME) and $$ in commands and variables, gives to the pod as it was."""
    return text.replace("$", "$$")


if __name__ == "__main__":
    launching.main(launch)
