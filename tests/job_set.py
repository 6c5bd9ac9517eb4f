"""The schema of a JobSet, as far as the manifests use it."""

# Fields of JobSet v1alpha2 (github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, and the rules of
# its webhook), of batch/v1's Job and core/v1's Pod. A name ends with ! where the field must be there.
NAMES = {"labels": {str: str}, "annotations": {str: str}}
VOLUME = {
    "name!": str,
    "emptyDir": {"medium": str},
    "persistentVolumeClaim": {"claimName!": str},
    "csi": {"driver!": str, "volumeAttributes": {str: str}},
}
POD = {
    "restartPolicy!": {"Never"},  # what a podFailurePolicy asks for
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {str: str},
    "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": {"NoSchedule"}}],
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet"},
    "volumes": [VOLUME],
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "env": [{"name!": str, "value": str}],
            "ports": [{"containerPort!": int}],
            "resources": {"limits": {str: int}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]}
JOB = {
    "completionMode": {"Indexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": {"FailJob", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]},
    "template!": {"metadata": NAMES, "spec!": POD},
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "namespace": str, **NAMES},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": ACTIONS, "onJobFailureReasons": [REASONS]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"metadata": NAMES, "spec!": JOB}}],
    },
}


def check(value, schema=JOB_SET, where="") -> None:
    """Refuses what is not of the schema: an unknown field, a field that is missing, another type or value."""
    match schema:
        case set():
            assert value in schema, f"{where} is {value}"
        case [inner]:
            assert isinstance(value, list), where
            for number, entry in enumerate(value):
                check(entry, inner, f"{where}[{number}]")
        case dict() if str in schema:
            assert isinstance(value, dict), where
            for name, entry in value.items():
                check(name, str, where)
                check(entry, schema[str], f"{where}.{name}")
        case dict():
            fields = {name.removesuffix("!"): inner for name, inner in schema.items()}
            assert isinstance(value, dict), where
            assert set(value) <= set(fields), f"{where} has {set(value) - set(fields)}"
            assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), f"{where} has too little"
            for name, entry in value.items():
                check(entry, fields[name], f"{where}.{name}")
        case _:
            assert type(value) is schema, f"{where} is {value!r}"
