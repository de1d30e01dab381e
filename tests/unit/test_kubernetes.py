"""docker/kubernetes by the API's own schemas, and by what no schema knows: our flags, paths, metrics and times."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import server.cli
from server.api import ops
from server.config import ConfigError, ServerConfig
from server.observability.reference import table
from server.serve import WRITE_LAST_WORDS_S

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "docker" / "kubernetes"
OLDEST = "1.25"
ENGINES = ("native", "vllm")
OURS = ("kustomize.config.k8s.io/v1beta1", "monitoring.coreos.com/v1")  # not of the API itself
LAST_STEPS_S = WRITE_LAST_WORDS_S + 2  # and uvicorn's own patience


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES / name).read_text())


def resources() -> Iterator[Any]:
    """Each resource of the Kubernetes API."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for found in yaml.safe_load_all(path.read_text()):
            if found.get("apiVersion", OURS[0]) not in OURS:
                yield pytest.param(found, id=f"{path.parent.name}/{path.name}")


def container(deployment: dict) -> dict[str, Any]:
    [found] = deployment["spec"]["template"]["spec"]["containers"]
    return found


def flags(deployment: dict) -> dict[str, str]:
    """`--name` → value, as the container is started."""
    command, *options = container(deployment)["args"]
    assert command == "serve"
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def number_of_bytes(quantity: str) -> int:
    amount, unit = re.fullmatch(r"(\d+)([KMGT]i)B?", quantity).groups()
    return int(amount) * 1024 ** (1 + "KMGT".index(unit[0]))


@pytest.fixture(params=ENGINES)
def deployment(request) -> dict[str, Any]:
    return document(f"{request.param}/deployment.yaml")


# ---- the schemas ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid() -> Callable[[dict, str], None]:
    found = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (docker extra)")

    def validate(resource: dict, version: str) -> None:
        found.validate(resource, found.latest_version() if version == "latest" else version, strict=True)

    return validate


@pytest.mark.parametrize("version", [OLDEST, "latest"])
@pytest.mark.parametrize("resource", list(resources()))
def test_the_api_takes_it(resource, version, valid):
    valid(resource, version)


BROKEN: dict[str, Callable[[dict], Any]] = {
    "a misspelt probe": lambda d: container(d).update(readynessProbe={}),
    "a port that is text": lambda d: container(d)["ports"][0].update(containerPort="8000"),
    "a flag that is a number": lambda d: container(d)["args"].append(8000),
    "no selector": lambda d: d["spec"].pop("selector"),
    "a grace period in words": lambda d: d["spec"]["template"]["spec"].update(terminationGracePeriodSeconds="90s"),
    "an unknown field deep down": lambda d: container(d)["securityContext"].update(readOnly=True),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_schema_sees_a_fault(fault, valid, deployment):
    import kubernetes_validate

    broken = copy.deepcopy(deployment)
    BROKEN[fault](broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(broken, "latest")


def test_an_older_api_of_the_autoscaler_is_seen(valid):
    import kubernetes_validate

    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        valid(document("base/autoscaler.yaml") | {"apiVersion": "autoscaling/v2beta2"}, "latest")


def test_each_folder_holds_what_it_lists():
    for path in KUBERNETES.rglob("kustomization.yaml"):
        listed = set(document(str(path.relative_to(KUBERNETES)))["resources"])
        files = {found.name for found in path.parent.glob("*.yaml")} - {path.name}
        assert {name for name in listed if name.endswith(".yaml")} == files
        assert all((path.parent / name / "kustomization.yaml").exists() for name in listed - files)


# ---- the command ---------------------------------------------------------------------------------------------------


def started(arguments: list[str], monkeypatch) -> str:
    """How far the command comes with these arguments: to the socket, which is not opened here, or to a sentence."""

    def stop(host: str, port: int) -> None:
        raise ConfigError(f"it would listen on {host}:{port}.")

    monkeypatch.setattr(server.cli, "listen", stop)
    environment = {"FINESTEER_API_KEY": "a,b", "FINESTEER_ADMIN_KEY": "c"}
    return re.sub(r"\s+", " ", CliRunner().invoke(server.cli.app, arguments, env=environment).output)


def known_flags() -> set[str]:
    shown = CliRunner().invoke(server.cli.app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown))


def test_the_server_starts_with_these_flags(deployment, monkeypatch):
    assert set(flags(deployment)) <= known_flags()
    if "--engine" in flags(deployment) and importlib.util.find_spec("vllm") is None:
        pytest.skip("the flags are known; vLLM is not installed to take their values")
    assert "it would listen on 0.0.0.0:8000." in started(container(deployment)["args"], monkeypatch)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("--prefix-cache-memory=2GiB", "--prefix-memory=2GiB"), "No such option"),
        (("--kv-cache-memory=2GiB", "--kv-cache-memory=2Go"), "must be a size"),
        (("--profile-policy=safety", "--profile-policy=safty"), "no profile 'safty'"),
    ],
)
def test_a_wrong_flag_is_seen(fault, said, monkeypatch):
    wrong = [a.replace(*fault) for a in container(document("native/deployment.yaml"))["args"]]
    assert wrong != container(document("native/deployment.yaml"))["args"]
    assert said in started(wrong, monkeypatch)


def test_each_key_comes_from_the_secret_and_the_server_wants_one(deployment, monkeypatch):
    secrets = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container(deployment)["env"] if "valueFrom" in e}
    assert set(secrets) == {server.config.API_KEY_VARIABLE, server.config.ADMIN_KEY_VARIABLE}
    assert not any("key" in flag for flag in flags(deployment))
    assert "optional" not in secrets[server.config.API_KEY_VARIABLE], "without a key it would not start"
    with pytest.raises(ConfigError, match="without an API key"):
        ServerConfig(model="m", served_model_name="m", host=flags(deployment)["--host"])


# ---- times and sizes -----------------------------------------------------------------------------------------------


def patience_s(deployment: dict) -> tuple[float, float]:
    """What is granted from the order to end on, and what ending may take."""
    [word, before] = container(deployment)["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    takes = float(before) + float(flags(deployment)["--shutdown-timeout"]) + LAST_STEPS_S
    return deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], takes


def test_it_is_not_killed_before_it_has_drained(deployment):
    granted, takes = patience_s(deployment)
    assert granted > takes
    short = copy.deepcopy(deployment)
    short["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 60
    granted, takes = patience_s(short)
    assert granted < takes


def test_services_forget_it_before_it_refuses(deployment):
    """A server that ends answers 503 at once, so SIGTERM comes after the endpoints have had time to change."""
    [_, before] = container(deployment)["lifecycle"]["preStop"]["exec"]["command"]
    assert float(before) >= 5


def test_probes_ask_what_there_is(deployment):
    paths = {route.path for route in ops.router.routes}
    probes = {name: container(deployment)[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",  # not /ready: a server that drains is not to be killed for it
        "readiness": "/ready",
    }
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= paths
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600


def test_threads_and_memory_are_what_it_asks_for():
    deployment = document("native/deployment.yaml")
    wants, given = container(deployment)["resources"]["requests"], flags(deployment)
    assert wants["cpu"] == given["--num-threads"]
    caches = [number_of_bytes(given[f"--{kind}-cache-memory"]) for kind in ("kv", "prefix")]
    assert sum(caches) <= number_of_bytes(wants["memory"]) / 2, "weights and activations want room"
    for engine in ENGINES:
        sizes = container(document(f"{engine}/deployment.yaml"))["resources"]
        assert sizes["limits"]["memory"] == sizes["requests"]["memory"]


def test_each_shard_has_a_card_and_they_share_memory():
    deployment = document("vllm/deployment.yaml")
    limits = container(deployment)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == flags(deployment)["--tensor-parallel-size"]
    [shared] = [v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "shared-memory"]
    assert shared["emptyDir"]["medium"] == "Memory"
    assert number_of_bytes(shared["emptyDir"]["sizeLimit"]) < number_of_bytes(limits["memory"])
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(deployment)["volumeMounts"]


def test_it_runs_as_the_image_does(deployment):
    image = (ROOT / "docker" / "Dockerfile").read_text()
    pod, inside = deployment["spec"]["template"]["spec"]["securityContext"], container(deployment)["securityContext"]
    assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}" in image and pod["runAsNonRoot"] is True
    assert inside["readOnlyRootFilesystem"] is True and inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in container(deployment)["volumeMounts"]}
    for name in ("HOME", "HF_HOME"):
        [folder] = re.findall(rf"\b{name}=(\S+)", image.rpartition("FROM ")[2])
        assert "readOnly" not in mounts[folder]
    for option in ("--model", "--profile"):
        folder = "/" + flags(deployment)[option].rpartition("=")[2].split("/")[1]
        assert mounts[folder]["readOnly"] is True
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes


# ---- names that must agree -----------------------------------------------------------------------------------------


def test_ports_agree(deployment):
    [port] = container(deployment)["ports"]
    assert str(port["containerPort"]) == flags(deployment)["--port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container(deployment)[probe]["httpGet"]["port"] == port["name"]
    [served] = document("base/service.yaml")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    [scraped] = document("monitoring/servicemonitor.yaml")["spec"]["endpoints"]
    assert scraped["port"] == served["name"] and scraped["path"] in {route.path for route in ops.router.routes}


def test_everything_means_the_same_pods(deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert document("base/service.yaml")["spec"]["selector"] == labels
    assert document("base/budget.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert document("monitoring/servicemonitor.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert document("base/service.yaml")["metadata"]["labels"] == labels  # which the monitor selects by
    target = document("base/autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"], target["name"]) == (
        deployment["apiVersion"],
        deployment["kind"],
        deployment["metadata"]["name"],
    )
    assert "replicas" not in deployment["spec"], "each apply would undo the autoscaler"
    assert (
        document("base/autoscaler.yaml")["spec"]["minReplicas"] > document("base/budget.yaml")["spec"]["maxUnavailable"]
    )


def exported() -> set[str]:
    """The names of all of a server's metrics, by the table that is made from a scrape."""
    return set(re.findall(r"^\| `([\w:]+)`", table(), re.M))


def adapted(names: set[str]) -> dict[str, str]:
    """The adapter's name of each series that its rule takes → the query that it asks Prometheus."""
    [rule] = document("monitoring/prometheus-adapter.yaml")["rules"]["custom"]
    [series] = re.findall(r'__name__=~"(.*?)"', rule["seriesQuery"])
    found = {}
    for name in names:
        if re.fullmatch(series, name):
            new = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$1", r"\1"), name)
            query = rule["metricsQuery"].replace("<<.Series>>", name)
            found[new] = query.replace("<<.LabelMatchers>>", 'namespace="n",pod=~"a|b"').replace("<<.GroupBy>>", "pod")
    return found


def scaled_by() -> dict[str, int]:
    metrics = [metric["pods"] for metric in document("base/autoscaler.yaml")["spec"]["metrics"]]
    return {metric["metric"]["name"]: int(metric["target"]["averageValue"]) for metric in metrics}


def test_the_autoscaler_reads_metrics_that_there_are():
    assert set(adapted(exported())) == set(scaled_by())
    assert not adapted({"vllm:num_requests_waiting", "finesteer:num_requests_waiting_total"})


def test_full_rows_ask_for_more_servers_and_so_does_a_short_queue():
    config, wanted = ServerConfig(model="m", served_model_name="m"), scaled_by()
    assert wanted["finesteer_num_requests_running"] < config.max_num_seqs
    assert wanted["finesteer_num_requests_waiting"] < config.max_num_seqs < config.max_waiting


def test_prometheus_takes_the_adapters_queries(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    rules = tmp_path / "rules.yml"

    def check(queries: list[str]) -> int:
        named = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries)]
        rules.write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": named}]}))
        return subprocess.run(shlex.split(f"promtool check rules {rules}"), capture_output=True).returncode

    queries = list(adapted(exported()).values())
    assert len(queries) == 2 and check(queries) == 0
    assert check([query.replace(") by", "} by") for query in queries]) != 0
