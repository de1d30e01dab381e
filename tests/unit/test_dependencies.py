"""The direction of dependencies, held by walking the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def offenders(files, *banned):
    return {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports(path)
        if any(module == b or module.startswith(b + ".") for b in banned)
    }


def files(*patterns):
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert found, patterns
    return found


@pytest.mark.parametrize(
    ("patterns", "banned"),
    [
        (["steering/**/*.py"], ["server", "fastapi", "starlette"]),
        (["steering/*.py"], ["transformers", "sklearn", "scipy", "matplotlib", "pydantic"]),
        (["steering/decision.py", "steering/manifest.py", "steering/errors.py"], ["torch"]),
        (
            ["server/wire/*.py", "server/errors.py", "server/answers/*.py", "server/service.py", "server/grammar/*.py"],
            ["torch", "fastapi"],
        ),
        (["server/engine/base.py", "server/engine/native/scheduler.py", "server/engine/native/sequence.py"], ["torch"]),
        (["server/engine/**/*.py", "server/prompting/*.py", "server/observability/*.py"], ["fastapi"]),
        (["server/api/*.py", "server/answers/*.py", "server/app.py"], ["server.engine.native", "server.engine.vllm"]),
        (["**/*.py"], ["pickle"]),
    ],
)
def test_imports_point_the_right_way(patterns, banned):
    found = [
        path for path in files(*patterns) if not {".venv", ".venv-clients", "tests"} & set(path.relative_to(ROOT).parts)
    ]
    assert offenders(found, *banned) == set()


def test_the_walk_sees_what_is_imported():
    assert offenders(files("server/app.py"), "fastapi")
