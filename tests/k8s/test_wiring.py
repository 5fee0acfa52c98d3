"""What no schema sees: that the documents fit each other, the package and the cluster's rules."""

import re
from itertools import chain

import pytest

from sere_ray import __version__
from tests.k8s.conftest import ROOT, of_kind, only
from tests.k8s.schemas import pod_templates

RAY_KINDS = ("RayService", "RayJob")


def pods(documents):
    return list(pod_templates(documents))


def containers(documents):
    return [c for pod in pods(documents) for c in pod["spec"]["containers"]]


def selected(selector, documents):
    """Pod templates that a label selector finds."""
    labels = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return [
        pod
        for pod in pods(documents)
        if all(pod["metadata"]["labels"].get(k) == v for k, v in labels.items())
        and all(pod["metadata"]["labels"].get(e["key"]) in e["values"] for e in expressions)
    ]


def ports(pod):
    (container,) = pod["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


def test_one_namespace(documents):
    for document in documents:
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "sere-ray", document["metadata"]["name"]


def test_images_are_pinned_and_ours_is_the_packages_version(documents, overlay):
    suffix = "-cpu" if overlay == "cpu-demo" else ""
    for container in containers(documents):
        name, _, tag = container["image"].rpartition(":")
        if name == "sere-ray":
            assert tag == __version__ + suffix
        else:
            assert re.fullmatch(r"\d+\.\d+\.\d+", tag), container["image"]


@pytest.mark.parametrize("file", ["cpu.txt", "gpu.txt", "gpu-033.txt"])
def test_ray_is_the_version_in_the_image(documents, file):
    (pin,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints" / file).read_text(), re.M)
    for document in documents:
        for name in ("rayClusterConfig", "rayClusterSpec"):
            if name in document.get("spec", {}):
                assert document["spec"][name]["rayVersion"] == pin


def test_pods_meet_the_restricted_profile(documents):
    for pod in pods(documents):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            assert key not in pod["spec"]
        for volume in pod["spec"].get("volumes", []):
            assert set(volume) & {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
    for container in containers(documents):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}


def test_every_container_says_what_it_needs(documents):
    for container in containers(documents):
        for side in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][side]), container["name"]
        # memory and GPUs: never more than what was reserved
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        for name in set(limits) - {"cpu"}:
            assert limits[name] == requests[name]


def test_ray_containers_can_write_where_they_must(documents):
    """The root file system is read-only: Ray's session, shared memory and caches are mounts."""
    for document in documents:
        if document["kind"] not in RAY_KINDS:
            continue
        for pod in pods(document):
            (container,) = pod["spec"]["containers"]
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
            assert set(mounts.values()) == set(volumes)
            assert {"/tmp", "/home/sere"} <= set(mounts)
            if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "submitter":
                assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_probes_and_the_name_label_of_ray_pods_are_left_to_the_operator(documents):
    for pod in pods([d for d in documents if d["kind"] in RAY_KINDS]):
        assert "app.kubernetes.io/name" not in pod["metadata"]["labels"]
        for container in pod["spec"]["containers"]:
            assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(container)


def test_the_head_does_no_work(documents):
    for document in documents:
        for name in ("rayClusterConfig", "rayClusterSpec"):
            head = document.get("spec", {}).get(name, {}).get("headGroupSpec")
            if head is not None:
                assert head["rayStartParams"]["num-cpus"] == "0"
                resources = head["template"]["spec"]["containers"][0]["resources"]
                assert "nvidia.com/gpu" not in resources["limits"]
                assert document["spec"][name]["authOptions"] == {"mode": "token"}


def test_a_draining_pod_has_the_time_that_requests_may_take(deployment):
    from sere_ray.serve.app import DRAIN_SECONDS

    (worker,) = only(deployment, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = worker["template"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    pause, stop = map(int, re.findall(r"\d+", command))
    assert pause == DRAIN_SECONDS
    assert pod["terminationGracePeriodSeconds"] > pause + stop


def test_selectors_find_pods(documents):
    for document in documents:
        spec = document.get("spec", {})
        kind, name = document["kind"], document["metadata"]["name"]
        if kind in ("PodDisruptionBudget", "PodMonitor"):
            assert selected(spec["selector"], documents), name
        elif kind == "StatefulSet":
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
        elif kind == "Service":
            assert selected({"matchLabels": spec["selector"]}, documents), name
        elif kind == "NetworkPolicy":
            assert selected(spec["podSelector"], documents), name
            peers = chain(spec.get("ingress", []), spec.get("egress", []))
            for peer in (p for rule in peers for p in rule.get("from", rule.get("to", []))):
                if "namespaceSelector" not in peer:
                    assert selected(peer["podSelector"], documents), name


def test_selectors_of_one_cluster_do_not_find_the_other(rendered, overlay):
    both = [*rendered[overlay, "deployment"], *rendered[overlay, "calibration"]]
    budget = only(both, "PodDisruptionBudget")
    (pod,) = selected(budget["spec"]["selector"], both)
    assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == "sere"


def test_ports_exist_where_they_are_named(documents):
    for document in documents:
        spec, name = document.get("spec", {}), document["metadata"]["name"]
        if document["kind"] == "Service":
            for pod in selected({"matchLabels": spec["selector"]}, documents):
                assert {port["targetPort"] for port in spec["ports"]} <= set(ports(pod)), name
        elif document["kind"] == "PodMonitor":
            for pod in selected(spec["selector"], documents):
                assert {e["port"] for e in spec["podMetricsEndpoints"]} <= set(ports(pod)), name
        elif document["kind"] == "NetworkPolicy":
            known = {
                port for pod in selected(spec["podSelector"], documents) for port in ports(pod)
            }
            for rule in spec.get("ingress", []):
                assert {p["port"] for p in rule.get("ports", [])} <= known, name


def test_the_ingress_leads_to_the_operators_service_and_not_to_the_control_api(deployment):
    service = only(deployment, "RayService")
    (rule,) = only(deployment, "Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["path"] == "/v1"
    assert path["backend"]["service"]["name"] == service["metadata"]["name"] + "-serve-svc"
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert ports(group["template"])["serve"] == path["backend"]["service"]["port"]["number"]


def test_claims_and_accounts_exist(documents):
    def names(kind):
        return {document["metadata"]["name"] for document in of_kind(documents, kind)}

    for pod in pods(documents):
        assert pod["spec"]["serviceAccountName"] in names("ServiceAccount")
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names(
                    "PersistentVolumeClaim"
                )


def test_volumes_can_be_made_before_anything_uses_them(documents):
    """`kubectl apply -l app.kubernetes.io/component=storage` of docs/operate.md."""
    found = {
        document["kind"]
        for document in documents
        if document["metadata"]["labels"].get("app.kubernetes.io/component") == "storage"
    }
    assert found == {"PersistentVolumeClaim"}
    for document in of_kind(documents, "PersistentVolumeClaim"):
        assert document["metadata"]["labels"]["app.kubernetes.io/component"] == "storage"


def secrets(value):
    """``(name, key or None)`` of every Secret that a document refers to."""
    if isinstance(value, list):
        for item in value:
            yield from secrets(item)
    elif isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]
        if "secretName" in value:
            yield value["secretName"], None
        for item in value.values():
            yield from secrets(item)


def test_secrets_are_only_referred_to_and_the_page_says_how_to_make_them(documents):
    assert not of_kind(documents, "Secret")
    page = (ROOT / "docs" / "operate.md").read_text().replace("\\\n", " ")
    for name, key in set(secrets(documents)):
        made = re.search(rf"create secret (generic|tls) {name} (.*)", page)
        assert made, f"docs/operate.md does not say how to create the Secret {name}"
        assert key is None or f"{key}=" in made[2]


SECRET_MATERIAL = (
    r"sk-sere-[A-Za-z0-9_-]{20,}",
    r"BEGIN [A-Z ]*PRIVATE KEY",
    r"\b[0-9a-f]{64}\b",  # a key's hash
    r"(?i)(password|token|secret)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{16,}",
)


@pytest.mark.parametrize("folder", ["k8s", "deploy"])
def test_no_secret_material(folder):
    for file in sorted((ROOT / folder).rglob("*")):
        if file.is_file():
            for pattern in SECRET_MATERIAL:
                assert not re.search(pattern, file.read_text()), (file, pattern)


@pytest.mark.parametrize(
    "line", ["password: c2VjcmV0c2VjcmV0c2VjcmV0", "x: -----BEGIN RSA PRIVATE KEY-----"]
)
def test_secret_material_would_be_found(line):
    assert any(re.search(pattern, line) for pattern in SECRET_MATERIAL)
