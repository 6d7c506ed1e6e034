"""The Kubernetes manifests: valid by Kubernetes' own schemas, and what they promise holds in our code.

`kubectl kustomize` renders them; it asks no cluster. The schemas come with the package kubernetes-validate. For
LeaderWorkerSet, RayService, ServiceMonitor and PodMonitoring no package has them: pod templates are checked by
Kubernetes' schemas all the same, and other fields here, by name.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ml_collections import ConfigDict

from icarus_jax.cli import engine_config
from icarus_jax.errors import UsageError
from icarus_jax.server.auth import ADMIN_PATHS, OPEN_PATHS, Keys, check_host
from tests.server.served import serving

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docs" / "deploy" / "kubernetes"
FOLDERS = ("base", "gpu", "tpu", "slice")
OLDEST, NEWEST = "1.30", "1.37"  # preStop.sleep is there since 1.30
LWS, SERVICE_MONITOR, POD_MONITORING = "LeaderWorkerSet", "ServiceMonitor", "PodMonitoring"
RAY = "RayService"
MARGIN_SECONDS = 20  # from the end of the drain to the end of the process
PRINT_CONFIG = """
from icarus_jax import cli
cli.run(lambda config: print(config.to_json()), default_config="")
"""

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the manifests")


@functools.cache
def rendered(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send for a folder; monitoring/ is plain files."""
    if folder == "monitoring":
        return [
            part
            for file in sorted((KUBERNETES / folder).glob("*.yaml"))
            for part in yaml.safe_load_all(file.read_text())
        ]
    made = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def the(folder: str, kind: str) -> dict[str, Any]:
    """The only object of a kind in a folder."""
    (found,) = (part for part in rendered(folder) if part["kind"] == kind)
    return found


def templates(folder: str) -> dict[str, dict[str, Any]]:
    """The pod templates of a folder: 'server', and 'worker' of a slice."""
    if folder != "slice":
        return {"server": the(folder, "Deployment")["spec"]["template"]}
    group = the(folder, LWS)["spec"]["leaderWorkerTemplate"]
    return {"server": group["leaderTemplate"], "worker": group["workerTemplate"]}


def ray_templates() -> dict[str, dict[str, Any]]:
    """The pod templates of the RayService's cluster."""
    cluster = the("ray", RAY)["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "worker": workers["template"]}


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    return only


@functools.cache
def config_of(folder: str, role: str) -> ConfigDict:
    """The config that a container's command line makes, in a process that reads flags as the server does."""
    pod = templates(folder)[role]
    (name,) = (volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume)
    stored = the(folder, "ConfigMap")
    assert stored["metadata"]["name"] == name
    mounted = {mount["name"]: mount["mountPath"] for mount in container(pod)["volumeMounts"]}["config"]
    with tempfile.TemporaryDirectory() as here:
        for file, text in stored["data"].items():
            Path(here, file).write_text(text)
        args = [arg.replace(mounted, here) for arg in container(pod)["args"]]
        made = subprocess.run([sys.executable, "-c", PRINT_CONFIG, *args], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    return ConfigDict(json.loads(made.stdout))


def schema_errors(part: dict[str, Any], version: str) -> str:
    try:
        kubernetes_validate.validate(part, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{part['kind']}: {error.message} at {list(error.path)}"
    return ""


def native(folder: str) -> Iterator[dict[str, Any]]:
    """The objects that Kubernetes itself knows, and the pod templates of those that it does not."""
    for part in rendered(folder):
        if part["kind"] not in (LWS, RAY, SERVICE_MONITOR, POD_MONITORING):
            yield part
    if folder in ("slice", "ray"):
        for name, template in (ray_templates() if folder == "ray" else templates(folder)).items():
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("folder", [*FOLDERS, "ray", "monitoring"])
def test_every_object_follows_kubernetes_schema(folder, version):
    found = [schema_errors(part, version) for part in native(folder)]
    assert found and not any(found), found


def test_the_schemas_notice_a_misspelt_field():
    part = json.loads(json.dumps(the("base", "Deployment")))
    container(part["spec"]["template"])["readinesProbe"] = {}
    assert "readinesProbe" in schema_errors(part, NEWEST)


def test_the_fields_of_a_leader_worker_set():
    part = the("slice", LWS)
    assert part["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert part["spec"].keys() == {"replicas", "rolloutStrategy", "leaderWorkerTemplate"}
    group = part["spec"]["leaderWorkerTemplate"]
    assert group.keys() == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    rollout = part["spec"]["rolloutStrategy"]
    assert rollout["type"] == "RollingUpdate"
    assert rollout["rollingUpdateConfiguration"].keys() == {"maxUnavailable", "maxSurge"}


def test_the_fields_of_a_ray_service():
    """As in KubeRay's API reference (ray.io/v1)."""
    part = the("ray", RAY)
    assert part["apiVersion"] == "ray.io/v1" and part["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    cluster = part["spec"]["rayClusterConfig"]
    assert cluster.keys() == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for params in (cluster["headGroupSpec"]["rayStartParams"], workers["rayStartParams"]):
        assert all(isinstance(value, str) for value in params.values())


def test_ray_serve_takes_its_config(monkeypatch):
    """Ray Serve's own schema, and our application with the arguments; a worker has room for one replica."""
    serve_ray = pytest.importorskip("launch.serve_ray")
    ray = pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    from icarus_jax.on_ray.cluster import needs

    part = the("ray", RAY)["spec"]
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(part["serveConfigV2"])).applications
    module, _, name = app.import_path.partition(":")
    assert module.removeprefix("icarus_jax.") == serve_ray.__name__ and app.route_prefix == "/"
    made = []
    monkeypatch.setattr("icarus_jax.on_ray.application.application", made.append)
    with pytest.raises(UsageError, match="keys"):
        getattr(serve_ray, name)(app.args)
    monkeypatch.setenv("ICARUS_API_KEYS", "ann:a")
    monkeypatch.setenv("ICARUS_ADMIN_KEYS", "b")
    getattr(serve_ray, name)(app.args)
    (config,) = made

    (workers,) = part["rayClusterConfig"]["workerGroupSpecs"]
    assert part["rayClusterConfig"]["rayVersion"] == ray.__version__
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (
        config.ray.replicas,
        config.ray.replicas,
        config.ray.max_replicas,
    )
    pod = ray_templates()["worker"]["spec"]
    (server,) = pod["containers"]
    assert needs(config.ray)["num_cpus"] == float(server["resources"]["limits"]["cpu"])
    assert pod["terminationGracePeriodSeconds"] >= config.server.drain_seconds + MARGIN_SECONDS


@pytest.mark.parametrize(
    "kind, version", [(SERVICE_MONITOR, "monitoring.coreos.com/v1"), (POD_MONITORING, "monitoring.googleapis.com/v1")]
)
def test_prometheus_reads_metrics_with_the_administrators_key(kind, version):
    part = the("monitoring", kind)
    (endpoint,) = part["spec"]["endpoints"]
    assert part["apiVersion"] == version and part["spec"].keys() == {"selector", "endpoints"}
    assert endpoint.keys() == {"port", "path", "interval", "authorization"}
    assert endpoint["path"] in ADMIN_PATHS and endpoint["authorization"]["type"] == "Bearer"
    credentials = endpoint["authorization"]["credentials"]
    secret = credentials if kind == SERVICE_MONITOR else credentials["secret"]
    wanted = part["spec"]["selector"]["matchLabels"].items()
    for folder in FOLDERS:
        pod = templates(folder)["server"]
        by_name = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container(pod)["env"] if "valueFrom" in e}
        assert secret == by_name["ICARUS_ADMIN_KEYS"]
        scraped = the(folder, "Service") if kind == SERVICE_MONITOR else pod
        assert wanted <= scraped["metadata"]["labels"].items()
        ports = the(folder, "Service")["spec"]["ports"] if kind == SERVICE_MONITOR else container(pod)["ports"]
        assert endpoint["port"] in [port["name"] for port in ports]


def test_the_collector_may_read_the_secret():
    (rule,) = the("monitoring", "Role")["rules"]
    credentials = the("monitoring", POD_MONITORING)["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert (rule["resourceNames"], rule["verbs"]) == ([credentials["secret"]["name"]], ["get"])
    assert the("monitoring", "RoleBinding")["roleRef"]["name"] == the("monitoring", "Role")["metadata"]["name"]


# ---- what the manifests say of our server


@pytest.mark.parametrize("folder, role", [*((folder, "server") for folder in FOLDERS), ("slice", "worker")])
def test_the_command_is_one_that_the_server_takes(folder, role):
    pod = templates(folder)[role]
    config = config_of(folder, role)
    assert container(pod)["command"] == ["icarus-serve"]
    engine_config(config.engine)
    env = {entry["name"] for entry in container(pod)["env"]}
    assert {"ICARUS_API_KEYS", "ICARUS_ADMIN_KEYS"} <= env
    keys = Keys.read("", "", environ={"ICARUS_API_KEYS": "ann:a,bob:b", "ICARUS_ADMIN_KEYS": "c"})
    check_host(config.server.host, keys, config.server.allow_remote_without_keys)
    assert config.server.host == "0.0.0.0" and not config.server.allow_remote_without_keys
    assert config.distributed.coordinator == ("auto" if folder == "slice" else "")


@pytest.mark.parametrize("folder", FOLDERS)
def test_ports_and_probes_are_the_servers(folder):
    server = container(templates(folder)["server"])
    (port,) = server["ports"]
    assert port["containerPort"] == config_of(folder, "server").server.port
    probes = [server[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert all(probe == {"path": "/health", "port": port["name"]} for probe in probes)
    assert "/health" in OPEN_PATHS  # a probe sends no key
    with serving(keys=Keys(["ann:a"], ["c"])) as served:
        assert served.http.get("/health").status_code == 200


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_is_time_to_drain(folder):
    pods = templates(folder)
    drain = config_of(folder, "server").server.drain_seconds
    seconds = container(pods["server"])["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    assert pods["server"]["spec"]["terminationGracePeriodSeconds"] >= seconds + MARGIN_SECONDS
    if "worker" in pods:  # it must outlive process 0
        program, wait = container(pods["worker"])["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        assert seconds < int(wait) < pods["worker"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_selectors_find_their_own_pods_alone(folder):
    labels = {name: pod["metadata"]["labels"].items() for name, pod in templates(folder).items()}
    others = [pod["metadata"]["labels"].items() for f in ("base", "slice") for pod in templates(f).values()]
    selectors = [the(folder, "Service")["spec"]["selector"]]
    if folder != "slice":
        name = the(folder, "Deployment")["metadata"]["name"]
        assert the(folder, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == name
        selectors += [
            the(folder, kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")
        ]
    for selector in selectors:
        assert selector.items() <= labels["server"]
        assert sum(selector.items() <= other for other in others) == 1
    (port,) = the(folder, "Service")["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in container(templates(folder)["server"])["ports"]]


def test_a_slice_runs_one_command_on_hosts_that_make_the_mesh():
    pods, group = templates("slice"), the("slice", LWS)["spec"]["leaderWorkerTemplate"]
    for field in ("image", "command", "args", "env", "resources", "volumeMounts"):
        assert container(pods["server"])[field] == container(pods["worker"])[field]
    assert pods["server"]["spec"]["nodeSelector"] == pods["worker"]["spec"]["nodeSelector"]
    check_chips(pods["server"], group["size"], config_of("slice", "server"))


def test_one_tpu_host_has_the_chips_of_the_mesh():
    check_chips(templates("tpu")["server"], 1, config_of("tpu", "server"))


def check_chips(pod: dict[str, Any], hosts: int, config: ConfigDict) -> None:
    """Chips of the hosts = chips of the topology = devices of the mesh."""
    resources, selector = container(pod)["resources"], pod["spec"]["nodeSelector"]
    assert resources["requests"]["google.com/tpu"] == resources["limits"]["google.com/tpu"]
    sizes = (selector["cloud.google.com/gke-tpu-topology"], config.engine.mesh)
    assert re.fullmatch(
        r"tpu-(v5-lite|v6e|v5p|7x|v4)-?(podslice|slice)?", selector["cloud.google.com/gke-tpu-accelerator"]
    )
    for size in sizes:
        product = functools.reduce(lambda a, b: a * int(b), size.split("x"), 1)
        assert product == hosts * int(resources["limits"]["google.com/tpu"])


def test_the_autoscaler_counts_gauges_of_ours():
    with serving() as served:
        page = served.http.get("/metrics").text
    for metric in the("base", "HorizontalPodAutoscaler")["spec"]["metrics"]:
        assert f"# TYPE {metric['pods']['metric']['name']} gauge" in page


@pytest.mark.parametrize("folder", [*FOLDERS, "ray"])
def test_images_are_built_here(folder):
    for pod in (ray_templates() if folder == "ray" else templates(folder)).values():
        name, tag = container(pod)["image"].split(":")
        assert name == "icarus-jax" and (ROOT / "docker" / f"Dockerfile.{tag}").is_file()
        assert "USER 10001" in (ROOT / "docker" / f"Dockerfile.{tag}").read_text()
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001


def test_nothing_holds_a_secret():
    parts = [part for folder in (*FOLDERS, "ray", "monitoring") for part in rendered(folder)]
    assert not [part for part in parts if part["kind"] == "Secret"]
    for folder in (*FOLDERS, "ray"):
        for pod in (ray_templates() if folder == "ray" else templates(folder)).values():
            for entry in container(pod)["env"]:
                assert "KEY" not in entry["name"] or entry.keys() == {"name", "valueFrom"}
