"""At the door: who asks, whether they may ask this, and whether they may ask it now."""

from __future__ import annotations

from dataclasses import dataclass

from server.access.keys import Access, ApiKey
from server.access.limits import Usage
from server.errors import AuthenticationError, ForbiddenError

OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
OPEN_FOLDER = "/page/"  # the files of the page at `/`, which itself asks for the key
ADMIN = {
    "/v1/steering/profiles/load": {"POST"},
    "/v1/steering/profiles/unload": {"POST"},
    "/v1/steering/defaults": {"GET", "HEAD", "PUT"},
}


@dataclass(frozen=True)
class Visitor:
    """Whoever asks: `name` for the log, and what their key has used (None: no limits)."""

    name: str
    usage: Usage | None = None


class Gatekeeper:
    """Knows the keys, and counts what each uses."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._usage = {key.name: Usage(key) for key in access.api_keys if _limited(key)}

    def admit(self, method: str, path: str, authorization: str) -> Visitor | None:
        """Who asks; None for anyone, where no key is wanted. Limited keys' POSTs are begun: `Usage.end` them.

        Raises AuthenticationError, ForbiddenError, RateLimitError.
        """
        key = _bearer(authorization)
        if method in ADMIN.get(path, ()):
            return self._administrator(key)
        if (
            path in OPEN_PATHS
            or path.startswith(OPEN_FOLDER)
            or (path == "/metrics" and not self._access.guard_metrics)
        ):
            return None
        if not self._access.api_keys and path != "/metrics":
            return None
        if self._access.administers(key):
            return Visitor("admin")
        holder = self._access.holder(key)
        if holder is None:
            raise AuthenticationError("Wrong or missing API key. Send it as `Authorization: Bearer KEY`.")
        usage = self._usage.get(holder.name) if method == "POST" else None
        if usage is not None:
            usage.begin()
        return Visitor(holder.name, usage)

    def _administrator(self, key: str) -> Visitor:
        if self._access.admin_sha256 is None:
            raise ForbiddenError(
                "This server has no admin key, so nobody administers it. Set FINESTEER_ADMIN_KEY and start it again.",
                code="no_admin_key",
            )
        if not self._access.administers(key):
            if self._access.holder(key) is not None:
                raise ForbiddenError("This takes the admin key; an API key does not do.", code="admin_key_required")
            raise AuthenticationError("Wrong or missing admin key. Send it as `Authorization: Bearer KEY`.")
        return Visitor("admin")


def _limited(key: ApiKey) -> bool:
    return any(limit is not None for limit in (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent))


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
