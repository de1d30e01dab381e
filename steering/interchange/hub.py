"""A profile to a hub repository with its card, and back into a folder."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from steering.errors import ProfileError
from steering.profile import EVIDENCE_FILE, MANIFEST_FILE, REPORT_FILE, TENSOR_FILE, SteeringProfile, hub_errors

PROFILE_FILES = (MANIFEST_FILE, TENSOR_FILE, "README.md", "report.md", "report_*.png")
REPORT_FILES = (REPORT_FILE, "report_*.svg", EVIDENCE_FILE)  # page and evidence may quote training queries


def push(folder: Path, repository: str, *, private: bool = True, report: bool = False, token: str | None = None) -> str:
    """Upload a profile's folder in one commit, making the repository if there is none; returns the commit's address.

    Args:
        repository: "owner/name".
        report: also the page and its evidence, which may quote training queries.
        token: default: the one that `hf auth login` or HF_TOKEN left.
    Raises:
        ProfileError: the folder holds no sound profile, or the hub refuses.
    """
    from huggingface_hub import HfApi

    version = SteeringProfile.load(folder).version
    api = HfApi(token=token)
    with hub_errors(f"{repository}: the hub does not take it"):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*PROFILE_FILES, *(REPORT_FILES if report else ())],
            commit_message=f"Steering profile {version}",
        )
    return commit.commit_url


def pull(repository: str, out: Path, *, revision: str | None = None, token: str | None = None) -> SteeringProfile:
    """Download a profile, with its card and whatever report it has, into a folder; returns it, checked.

    Args:
        revision: a branch, tag or commit; None is the main branch's newest.
    Raises:
        ProfileError: `out` holds something already, the hub gives nothing, or what it gives is no sound profile.
    """
    from huggingface_hub import snapshot_download

    if out.exists() and any(out.iterdir()):
        raise ProfileError(f"{out}: not empty. Give a new folder, so that no two profiles' files mix.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        with hub_errors(f"{repository}: the hub does not give it"):
            snapshot_download(
                repository,
                revision=revision,
                local_dir=unfinished,
                allow_patterns=[*PROFILE_FILES, *REPORT_FILES],
                token=token,
            )
        if not (Path(unfinished) / MANIFEST_FILE).is_file():
            raise ProfileError(f"{repository}: the repository holds no profile: there is no {MANIFEST_FILE} in it.")
        SteeringProfile.load(unfinished)
        out.mkdir(exist_ok=True)
        for path in Path(unfinished).iterdir():
            if path.is_file():
                path.replace(out / path.name)
    return SteeringProfile.load(out)
