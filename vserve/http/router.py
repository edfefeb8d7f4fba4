"""Router: the explicit route table, matched on the decoded path.  Knows no bytes and calls no handler."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vserve.errors import MethodNotAllowed, NotFound, NotImplementedMethod, shorten
from vserve.http.exchange import Handler

# RFC 9110 9.3 and RFC 5789: methods that exist; another one is 501 (RFC 9110 9.1), these are 405 where not served.
_REGISTERED = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"})
_PARAMETER = re.compile(r"\{([a-z_]+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table.

    pattern: "/v1/models/{id}": {id} takes one segment, {id:path} the rest with its slashes (at least one character).
    name: label in logs and metrics.  auth: scope a caller needs.  body: False throws content away unread by anyone.
    vital: answered even when the limit of connections is reached (probes).
    """

    method: str
    pattern: str
    handler: Handler
    name: str
    auth: str = "infer"
    body: bool = False
    vital: bool = False


class Router:
    """Finds the route of a request.  Immutable once built; any thread."""

    def __init__(self, routes: Sequence[Route], root_path: str = "") -> None:
        """routes: patterns with parameters are tried in this order, after the plain paths.  ValueError on a repeat.

        root_path: a prefix such as "/llm" that is taken off a path that has it; paths without it are served as well.
        """
        self.routes = tuple(routes)
        self._root = f"{root_path}/"
        plain: dict[str, dict[str, Route]] = {}
        matched: dict[str, dict[str, Route]] = {}
        for route in self.routes:
            row = (matched if re.search(r"[{}]", route.pattern) else plain).setdefault(route.pattern, {})
            if route.method in row:
                raise ValueError(f"two routes for {route.method} {route.pattern}")
            row[route.method] = route
        self._plain = plain
        self._patterns = [(_compile(pattern), row) for pattern, row in matched.items()]
        self.methods = _allow({route.method: route for route in self.routes})

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """The route and its path parameters; HEAD falls to GET.

        Raises NotFound (404), MethodNotAllowed (405, with Allow) or NotImplementedMethod (501).
        """
        row, params = self._row(path)
        route = row.get(method) or (row.get("GET") if method == "HEAD" else None)
        if route is not None:
            return route, params
        if method not in _REGISTERED:
            raise NotImplementedMethod(f"The method {shorten(method, 40)} is not implemented.")
        raise MethodNotAllowed(f"{method} is not allowed here.", allow=_allow(row))

    def allow(self, path: str) -> tuple[str, ...]:
        """The methods a path serves, for Allow; "*" stands for the server as a whole.  Raises NotFound."""
        return self.methods if path == "*" else _allow(self._row(path)[0])

    def _row(self, path: str) -> tuple[dict[str, Route], dict[str, str]]:
        if len(self._root) > 1 and path.startswith(self._root):
            path = path[len(self._root) - 1 :]
        row = self._plain.get(path)
        if row is not None:
            return row, {}
        for pattern, row in self._patterns:
            match = pattern.fullmatch(path)
            if match is not None:
                return row, match.groupdict()
        raise NotFound(f"There is nothing at {shorten(path, 100)}.")


def _compile(pattern: str) -> re.Pattern[str]:
    parts, position = [], 0
    for match in _PARAMETER.finditer(pattern):
        parts.append(re.escape(pattern[position : match.start()]))
        parts.append(f"(?P<{match[1]}>{'.+' if match[2] else '[^/]+'})")
        position = match.end()
    rest = pattern[position:]
    if "{" in rest or "}" in rest:
        raise ValueError(f"malformed route pattern {pattern!r}")
    return re.compile("".join(parts) + re.escape(rest))


def _allow(row: Mapping[str, Route]) -> tuple[str, ...]:
    methods = {*row, "OPTIONS"} | ({"HEAD"} if "GET" in row else set())
    return tuple(sorted(methods))
