"""`finesteer push` and `pull`, as processes, against a hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from steering.profile import SteeringProfile
from tests.fake_hub import TOKEN, fake_hub
from tests.lab import make_lab, train


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    lab = make_lab(tmp_path_factory.mktemp("hub"))
    assert train(lab, lab / "p").exit_code == 0
    return lab / "p"


@pytest.fixture
def hub():
    with fake_hub() as made:
        yield made


@pytest.fixture
def run(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "COLUMNS": "300"}

    def run(*words, token=TOKEN):
        command = [sys.executable, "-m", "server", *map(str, words)]
        return subprocess.run(command, env=environment | {"HF_TOKEN": token}, capture_output=True, text=True)

    return run


def test_a_profile_goes_to_the_hub_and_comes_back(profile, hub, run, tmp_path):
    pushed = run("push", profile, "me/p")
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    files, version = hub.repositories["me/p"], SteeringProfile.load(profile).version
    assert {"profile.json", "profile.safetensors", "README.md", "report.md"} <= set(files)
    assert not {"report.html", "evidence.json"} & set(files), "they quote training queries"
    linked = {line[line.index("(") + 1 : -1] for line in files["report.md"].decode().splitlines() if line[:2] == "!["}
    assert linked and linked <= set(files), "the report's figures are there"
    assert "me/p" in hub.private and version in hub.messages[0] and "library_name: finesteer" in hub.cards[0]

    pulled = run("pull", "me/p", "--out", tmp_path / "back")
    assert pulled.returncode == 0 and version in pulled.stdout, pulled.stdout + pulled.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == files
    assert version in run("inspect", "me/p").stdout, "a repository's name serves where a folder does"


def test_the_report_goes_along_where_it_is_asked_for(profile, hub, run):
    assert run("push", profile, "me/p", "--report", "--public").returncode == 0
    assert {"report.html", "evidence.json"} <= set(hub.repositories["me/p"]) and not hub.private


def test_what_the_hub_refuses_is_said(profile, hub, run, tmp_path):
    cases = [
        (run("push", profile, "me/p", token="hf_stranger"), "HTTP 401"),
        (run("push", tmp_path / "none", "me/p"), "no such profile folder"),
        (run("push", profile, "me/p/q"), "Check the spelling"),
        (run("pull", "me/none", "--out", tmp_path / "a"), "HTTP 404"),
    ]
    for result, message in cases:
        said = " ".join(result.stdout.split())
        assert result.returncode == 2 and message in said and "Traceback" not in result.stderr, said + result.stderr
    assert not hub.repositories and {p.name for p in tmp_path.iterdir()} <= {"home"}


def test_a_pull_leaves_nothing_where_it_fails(profile, hub, run, tmp_path):
    assert run("push", profile, "me/p").returncode == 0
    hub.repositories["me/empty"] = {"README.md": b"soon"}
    hub.repositories["me/bent"] = hub.repositories["me/p"] | {"profile.safetensors": b"bent"}
    for name, message in (("empty", "holds no profile"), ("bent", "sha256 differs")):
        result = run("pull", f"me/{name}", "--out", tmp_path / "out")
        assert result.returncode == 2 and message in result.stdout, result.stdout + result.stderr
        assert {p.name for p in tmp_path.iterdir()} <= {"home"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    result = run("pull", "me/p", "--out", tmp_path / "full")
    assert result.returncode == 2 and "not empty" in result.stdout and len(list((tmp_path / "full").iterdir())) == 1
