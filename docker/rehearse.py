"""Run the image's build without a container engine: `python docker/rehearse.py FOLDER`, where FOLDER is new.

Does what the Dockerfile's `build` stage says, with FOLDER as ROOT: copies what the stage copies (and the .dockerignore lets
through), and runs its RUN steps as they stand, by the interpreter that runs this. The base image's system is this machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from string import Template

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"


def instructions(stage: str | None) -> Iterator[tuple[str, str]]:
    """(instruction, its text on one line) of the stage that is named so; of the last one where it is None."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    stages = re.split(r"^(?=FROM )", text, flags=re.M)[1:]
    [found] = [s for s in stages if s.split("\n")[0].endswith(f" AS {stage}")] if stage else stages[-1:]
    for line in found.splitlines()[1:]:
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, re.sub(r"\s+", " ", rest.strip())


def settings(text: str) -> dict[str, str]:
    """The pairs of an ENV or ARG instruction."""
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S*)', text)}


def ignored(path: Path) -> bool:
    """Whether the .dockerignore leaves a file (relative to the repository) out; its last matching line decides."""
    out = False
    for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = (
            path.parts
            if line.startswith("**/")
            else [str(Path(*path.parts[:n])) for n in range(1, 1 + len(path.parts))]
        )
        if any(fnmatch(part, pattern) for part in parts):
            out = not line.startswith("!")
    return out


def copy(sources: list[str], target: Path) -> None:
    """COPY: folders' contents into `target`, files into it."""
    target.mkdir(parents=True, exist_ok=True)
    for source in map(Path, sources):
        whole = REPOSITORY / source
        files = [f for f in whole.rglob("*") if f.is_file()] if whole.is_dir() else [whole]
        kept = [file for file in files if not ignored(file.relative_to(REPOSITORY))]
        if not kept:
            raise SystemExit(f"COPY {source}: nothing is there, or the .dockerignore leaves it out")
        for file in kept:
            to = target / (file.relative_to(whole) if whole.is_dir() else file.name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to)


def build(root: Path) -> None:
    """The `build` stage with `root` as ROOT. Raises SystemExit, CalledProcessError."""
    python = root / "base" / "bin"  # the base image has a `python`
    python.mkdir(parents=True)
    (python / "python").symlink_to(Path(sys.executable).resolve())
    given = {"ROOT": str(root)}
    names: dict[str, str] = {}
    where = root
    for instruction, text in instructions("build"):
        print(instruction, text, flush=True)
        match instruction:
            case "ARG":
                names |= settings(text) | {k: v for k, v in given.items() if k in settings(text)}
            case "ENV":
                names |= settings(text)
            case "WORKDIR":
                where = Path(Template(text).substitute(names))
                where.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = text.split()
                copy(sources, where / target)
            case "RUN":
                path = f"{python}{os.pathsep}{os.environ['PATH']}"
                subprocess.run(["/bin/sh", "-c", text], cwd=where, env=os.environ | names | {"PATH": path}, check=True)
            case _:
                raise SystemExit(f"{instruction}: not rehearsed")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        raise SystemExit(__doc__)
    build(Path(sys.argv[1]).resolve())
