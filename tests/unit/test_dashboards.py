"""The committed dashboards: made by their script, nothing that Grafana's schema does not know, and readable."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GRAFANA = Path(__file__).parents[2] / "docker" / "grafana"
SCHEMA = Path(__file__).parents[1] / "grafana_schema"
BOARDS = {name: json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text()) for name in ("steering", "serving")}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
every_panel = pytest.mark.parametrize("panel", [panel for _, panel in PANELS], ids=[p["title"] for _, p in PANELS])


@pytest.fixture
def sdk():
    return pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed (dev extra)")


def test_the_committed_json_is_what_the_script_makes(sdk, tmp_path):
    subprocess.run([sys.executable, GRAFANA / "make.py", tmp_path], check=True)
    for name in BOARDS:
        made, committed = tmp_path / f"{name}.json", GRAFANA / "dashboards" / f"{name}.json"
        assert made.read_text() == committed.read_text(), "run python docker/grafana/make.py"


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_types_read_it_and_lose_nothing(sdk, name):
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def keeps(board: dict) -> bool:
        return _within(board, json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)))

    assert keeps(BOARDS[name])
    odd = copy.deepcopy(BOARDS[name])
    odd["panels"][1]["targets"][0]["no_such_field"] = 1
    assert not keeps(odd)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Checks a file against Grafana's TypeScript types."""
    folder = tmp_path_factory.mktemp("schema")
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    for file in SCHEMA.glob("*.*"):
        if file.is_file():
            shutil.copy(file, folder)
    installed = subprocess.run(
        ["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"npm could not install Grafana's types: {installed.stderr[-200:]}")
    return lambda files: subprocess.run(["node", folder / "check.mjs", *files], capture_output=True, text=True)


@pytest.mark.slow
def test_they_are_valid_by_the_types_of_the_grafana_that_the_compose_file_starts(check, tmp_path):
    done = check(GRAFANA / "dashboards" / f"{name}.json" for name in BOARDS)
    assert done.returncode == 0, done.stderr
    version = json.loads((SCHEMA / "package.json").read_text())["dependencies"]["@grafana/schema"]
    assert f"image: grafana/grafana:{version}\n" in (GRAFANA.parent / "compose.yaml").read_text()
    text = (GRAFANA / "dashboards" / "steering.json").read_text()
    bad = {
        "a": ('"showLegend"', '"showLegnd"'),
        "b": ('"unit": "s"', '"unit": 3'),
        "c": ('"mode": "multi"', '"mode": "x"'),
    }
    for name, (right, wrong) in bad.items():
        assert right in text
        (tmp_path / f"{name}.json").write_text(text.replace(right, wrong, 1))
    problems = check(tmp_path / f"{name}.json" for name in bad).stderr
    assert all(f"{name}.json: " in problems for name in bad), problems


def _within(part: object, whole: object) -> bool:
    """Whether `whole` has all of `part`; defaults may have come to it."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and _within(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(_within, part, whole))
    return part == whole


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_has_its_variables_and_numbers_its_panels(name):
    board = BOARDS[name]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance"} | ({"profile"} if name == "steering" else set())
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for other in set(variables) - {"datasource"}:
        assert variables[other]["multi"] and variables[other]["includeAll"] and variables[other]["label"]
        assert variables[other]["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r"\$(\w+)", json.dumps(board["panels"])))
    assert used - {"__rate_interval", "datasource"} == set(variables) - {"datasource"}


@every_panel
def test_a_panel_says_what_it_shows(panel):
    assert panel["title"] and panel["description"].endswith(".") and len(panel["description"]) < 400
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    legends = [target["legendFormat"] for target in panel["targets"]]
    assert all(legends) and len(set(legends)) == len(legends)
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"]
    for target in panel["targets"]:
        kept = set(", ".join(re.findall(r"by \(([^)]*)\)", target["expr"])).split(", "))
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        if " by (" in target["expr"]:
            assert named <= kept, "the legend names a label that the query sums away"


def test_the_panels_do_not_overlap():
    for board in BOARDS.values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at.get("x", 0) + x, at.get("y", 0) + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not taken & cells and max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells


def test_provisioning_finds_them():
    yaml = pytest.importorskip("yaml")
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/finesteer.yaml").read_text())["providers"]
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert provider["type"] == "file" and source["type"] == "prometheus"
    volumes = yaml.safe_load((GRAFANA.parent / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    mounted = dict(volume.split(":")[:2] for volume in volumes if volume.startswith("./"))
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
