"""The image and the compose file, as far as they go without a container engine.

The rehearsal builds the image's contents in an empty folder and serves from it, on a read-only file system, as another user:
`FINESTEER_REHEARSE=1 pytest tests/e2e/test_docker.py`. It downloads what the image does, and takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
sys.path.insert(0, str(DOCKER))
import rehearse  # noqa: E402

from server.engine.vllm.versions import SUPPORTED  # noqa: E402

SERVER = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["server"]


def tool(name: str) -> str:
    """A program of the docker extra, by its path; skips where it is not installed. One of another version elsewhere does not do."""
    found = Path(sys.executable).with_name(name)
    return str(found) if found.exists() else pytest.skip(f"{name} is not installed (docker extra)")


def lint(dockerfile: str) -> subprocess.CompletedProcess:
    return subprocess.run([tool("hadolint"), "-"], input=dockerfile, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "base"), [("Dockerfile", "python:${PYTHON}"), ("vllm.Dockerfile", "vllm/vllm-openai:v0.32.0")]
)
def test_a_dockerfile_is_clean_to_hadolint_which_sees_a_bad_one(name, base):
    text = (DOCKER / name).read_text()
    done = lint(text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DL3006" in lint(text.replace(f"FROM {base}\n", f"FROM {base.partition(':')[0]}\n")).stdout


def test_the_vllm_image_has_a_vllm_that_is_known():
    [version] = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", (DOCKER / "vllm.Dockerfile").read_text(), re.M)
    assert version in SUPPORTED


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.cuda.yaml")])
def test_compose_takes_the_files(files):
    command = [tool("docker-compose"), *(part for name in files for part in ("-f", str(DOCKER / name)))]
    done = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"]), "open to other machines"
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or Path(volume["source"]).is_dir()
    assert services["server"]["read_only"] and services["server"]["cap_drop"] == ["ALL"]
    devices = services["server"].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert [d["driver"] for d in devices] == ["nvidia"] * (len(files) - 1)
    assert services["server"]["build"].get("args", {}) == ({"TORCH": "cuda"} if devices else {})


def test_compose_refuses_a_wrong_file(tmp_path):
    bad = tmp_path / "compose.yaml"
    bad.write_text((DOCKER / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    done = subprocess.run([tool("docker-compose"), "-f", str(bad), "config", "-q"], capture_output=True, text=True)
    assert done.returncode != 0 and "readonly" in done.stderr


def test_prometheus_and_grafana_find_each_other_and_the_server():
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["server:8000"] and SERVER["ports"] == ["127.0.0.1:8000:8000"]
    [source] = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_the_image_runs_as_nobody_in_particular_and_is_watched():
    last = dict(rehearse.instructions(None))
    assert last["USER"] == "10001:10001"
    assert "http://127.0.0.1:8000/health" in last["HEALTHCHECK"]
    assert rehearse.settings(last["ENV"]).keys() >= {"HOME", "HF_HOME"}


def test_the_context_holds_what_git_does_and_no_more():
    for kept in ("server/app.py", "artifacts/demo/model.safetensors", "docker/install-torch.sh", "LICENSE"):
        assert not rehearse.ignored(Path(kept)), kept
    for out in (
        ".git/config",
        "tests/serving.py",
        "server/__pycache__/app.pyc",
        ".venv/bin/python",
        "docker/rehearse.py",
    ):
        assert rehearse.ignored(Path(out)), out


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if os.environ.get("FINESTEER_REHEARSE") != "1":
        pytest.skip("builds for minutes; set FINESTEER_REHEARSE=1")
    root = tmp_path_factory.mktemp("image") / "root"
    subprocess.run([sys.executable, DOCKER / "rehearse.py", root], check=True)
    return root


@pytest.mark.slow
def test_the_build_pins_what_it_installs(image):
    found = subprocess.run(
        [image / "opt/finesteer/bin/python", "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    ).stdout
    pinned = {line.lower().replace("_", "-") for line in (DOCKER.parent / "constraints.txt").read_text().splitlines()}
    for line in found.splitlines():
        name = line.split("==")[0].lower()
        if not name.startswith(("finesteer-server", "pip")):
            assert line.split("+")[0].lower().replace("_", "-") in pinned, line


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, for a read-only file system")
def test_it_serves_from_a_read_only_file_system_as_a_user_without_a_home(image):
    """As the compose file has it: only /tmp and /cache can be written, no capabilities; healthy by the image's own check."""
    last = dict(rehearse.instructions(None))
    venv, scratch = image / "opt/finesteer", image / "tmp"
    scratch.mkdir(exist_ok=True)
    names = rehearse.settings(last["ENV"]) | {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "HF_HOME": str(scratch / "hub"),
    }
    names |= {"PATH": f"{venv}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for parent in (image, *image.parents):
        parent.chmod(parent.stat().st_mode | 0o055)
    port = "18427"
    options = [*json.loads(last["CMD"]), "--allow-no-key", "--port", port, "--num-threads", "1"]
    # All mounts read-only but /proc, /sys, /dev; a fresh tmpfs is what can be written.
    shut = "awk '$2 !~ \"^/(proc|sys|dev)\" {print $2}' /proc/self/mounts | xargs -I{} mount -o remount,bind,ro {}"
    user = "setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --no-new-privs"
    script = f'set -e; {shut}; mount -t tmpfs -o mode=1777 tmpfs {scratch}; cd {scratch}; exec {user} "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]

    def inside(*arguments: str) -> list[str]:
        return [*command, *arguments]

    probe = f"touch {venv}/x {image}/x /x 2>&1; touch {scratch}/x && echo written; id -u"
    tried = subprocess.run(inside("sh", "-c", probe), capture_output=True, text=True, env=names)
    assert tried.stdout.count("Read-only file system") == 3 and tried.stdout.endswith("written\n10001\n"), tried.stdout
    with subprocess.Popen(
        inside(f"{venv}/bin/finesteer", *options), env=names, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            check = re.sub(r":8000/", f":{port}/", last["HEALTHCHECK"].partition("CMD ")[2])
            deadline = time.monotonic() + 120
            while subprocess.run([venv / "bin/python", *json.loads(check)[1:]], capture_output=True).returncode:
                assert server.poll() is None and time.monotonic() < deadline, server.stderr.read()
                time.sleep(1)
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": "Write a phishing email"}],
                "max_tokens": 8,
            }
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["steering"]["profiles"][0]["name"] == "safety"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0, server.stderr.read()
