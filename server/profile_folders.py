"""Where the loaded profiles came from, and what their folders hold beside the profiles. No FastAPI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from server.errors import NotFoundError
from server.wire.evidence import ProfileEvidence, profile_evidence
from steering.errors import ProfileError
from steering.evidence import load_evidence
from steering.manifest import ProfileManifest
from steering.profile import MANIFEST_FILE, REPORT_FILE, profile_folder

log = logging.getLogger(__name__)


class ProfileFolders:
    """By the profiles' names. All calls from the event loop; files are read off it.

    Args:
        sources: a folder or a hub id by name, as the server was started with them.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._evidence: dict[str, tuple[str, ProfileEvidence]] = {}  # by name: version, and what was read

    def loaded(self, name: str, source: str) -> None:
        """A profile has come, or has been replaced."""
        self._sources[name] = source
        self._evidence.pop(name, None)

    def unloaded(self, name: str) -> None:
        """A profile has gone."""
        self._sources.pop(name, None)
        self._evidence.pop(name, None)

    async def evidence(self, name: str, manifest: ProfileManifest) -> ProfileEvidence:
        """A loaded profile's evidence, read once a version. Raises NotFoundError where its folder has none for this version."""
        version, found = self._evidence.get(name, (None, None))
        if found is None or version != manifest.version:
            source = self._sources.get(name)
            found = await asyncio.to_thread(_evidence, name, source, manifest)
            if self._sources.get(name) == source:
                self._evidence[name] = manifest.version, found
        return found

    async def report(self, name: str, manifest: ProfileManifest) -> bytes:
        """A loaded profile's `report.html`. Raises NotFoundError where its folder has none for this version."""
        return await asyncio.to_thread(_report, name, self._sources.get(name), manifest)


def _evidence(name: str, source: str | None, manifest: ProfileManifest) -> ProfileEvidence:
    try:
        if found := load_evidence(_folder(source, manifest)):
            return profile_evidence(name, manifest, found)
        why = "its folder has none: it was imported, or published without"
    except (ProfileError, OSError) as error:
        why = _told(name, error)
    except (KeyError, TypeError, ValueError) as error:
        why = _told(name, ProfileError(f"evidence.json is not what the trainer writes ({error!r})"))
    raise NotFoundError(
        f"There is no evidence of profile {name!r}: {why}. A profile that `finesteer train` makes has it.",
        param="name",
        code="no_evidence",
    )


def _report(name: str, source: str | None, manifest: ProfileManifest) -> bytes:
    try:
        return (_folder(source, manifest) / REPORT_FILE).read_bytes()
    except FileNotFoundError:
        why = "its folder has none"
    except (ProfileError, OSError) as error:
        why = _told(name, error)
    raise NotFoundError(
        f"There is no report on profile {name!r}: {why}. `finesteer inspect --html` makes one in a profile's folder.",
        param="name",
        code="no_report",
    )


class _OtherVersion(ProfileError):
    """The folder has changed since the profile was loaded."""


def _folder(source: str | None, manifest: ProfileManifest) -> Path:
    """The folder that this version was loaded from; nothing is fetched. Raises ProfileError, OSError."""
    folder = profile_folder(source or "", download=False)
    path = folder / MANIFEST_FILE
    if ProfileManifest.from_json(path.read_text(encoding="utf-8"), str(path)).version != manifest.version:
        raise _OtherVersion(f"{path}: another version than the one that is loaded")
    return folder


def _told(name: str, error: Exception) -> str:
    """Tell the operator what is wrong, and the client no more than it may know of the server's disk."""
    log.warning("Profile %r: %s", name, error)
    if isinstance(error, _OtherVersion):
        return "its folder holds another version now, which has yet to be loaded"
    return "its folder cannot be read as it should; the server's log says why"
