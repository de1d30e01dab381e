"""What the API calls a path: the label of its metrics and the route of its span. Never a path as a client wrote it."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match, Route


class RouteNames:
    """Looks paths up among routes, whatever the method."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        found = [route for route in routes if isinstance(route, Route)]
        self._fixed = {route.path for route in found if "{" not in route.path}
        self._patterns = [route for route in found if "{" in route.path]
        self.all = sorted(self._fixed | {_name(route) for route in self._patterns})

    def of(self, path: str) -> str | None:
        """`/v1/models/{model}` for `/v1/models/x`; None where no route is meant."""
        if path in self._fixed:
            return path
        scope = {"type": "http", "path": path, "method": "GET", "root_path": ""}
        for route in self._patterns:
            if route.matches(scope)[0] is not Match.NONE:
                return _name(route)
        return None


def _name(route: Route) -> str:
    return route.path.replace(":path}", "}")
