"""Write the dashboards' JSON: `python docker/grafana/make.py`, and commit what changes. Needs the dev extra."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import serving_dashboard
import steering_dashboard
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

BOARDS = {"steering": steering_dashboard.build, "serving": serving_dashboard.build}


def text_of(board: Dashboard) -> str:
    """The dashboard's JSON, its panels numbered."""
    built = board.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    for variable in built.templating.list_val:
        variable.auto = variable.auto_min = variable.auto_count = (
            None  # interval variables', but the SDK gives them to all
        )
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(folder: Path) -> None:
    for name, build in BOARDS.items():
        (folder / f"{name}.json").write_text(text_of(build()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
