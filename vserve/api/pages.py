"""The pages people look at: the home page, Swagger UI with its OAuth2 redirect, Redoc, and the files they are made of.

Owns where each stands and what each may do (its Content-Security-Policy).  All links are relative, so that the pages
work behind any prefix.  Event-loop thread; a file is read and unpacked in the pool, once (4 MB for all of them).
"""

from __future__ import annotations

import functools
from urllib.parse import urlsplit

from vserve.api.app import App
from vserve.api.assets import Asset
from vserve.api.entry import INFER
from vserve.http.exchange import Exchange, Fields, Response

FOLDER = "/docs/static/"
FILES = (
    "swagger-ui-bundle.js",
    "swagger-ui.css",
    "swagger.js",
    "swagger.css",
    "redoc.standalone.js",
    "redoc.js",
    "redoc.css",
    "redirect.js",
    "home.js",
    "home.css",
    "icon.svg",
    "LICENSES.txt",
)
"""What is served in FOLDER; each is a row of the route table, so there is no path to play with."""

_REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' "  # nothing: the rules are added to it by script
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='"  # of its scroll bars
)
"""The hashes of the style elements that Redoc makes: no other inline style is let in."""


def policy(*, connect: str = "'self'", style: str = "'self'", worker: str = "'none'") -> Fields:
    """The fields that bind a page to this server: its scripts, its styles, its API, no frame around it."""
    rules = (
        "default-src 'none'",
        "script-src 'self'",
        f"style-src {style}",
        f"connect-src {connect}",
        "img-src 'self' data:",
        f"worker-src {worker}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return (
        ("content-security-policy", "; ".join(rules)),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
    )


PLAIN = policy()


class Pages:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._files: dict[str, Asset] = {}  # bounded by FILES and the pages
        flow = app.options.oauth2
        # Swagger UI changes the issuer's code for a token itself.
        issuer = "" if flow is None else " " + _origin(flow.token_url)
        self._docs_policy = policy(connect=f"'self'{issuer}")
        self._redoc_policy = policy(style=f"'self' {_REDOC_STYLES}", worker="blob:")

    async def home(self, exchange: Exchange) -> Response:
        """The home page.  It is told whether there are keys: a request to find out would be an error to a browser."""
        guarded = self._app.keys.guards(INFER)
        return await self._reply(exchange, "guarded.html" if guarded else "home.html", PLAIN)

    async def docs(self, exchange: Exchange) -> Response:
        """Swagger UI."""
        return await self._reply(exchange, "swagger.html", self._docs_policy)

    async def redirect(self, exchange: Exchange) -> Response:
        """Where an OAuth2 issuer sends the browser back to."""
        return await self._reply(exchange, "redirect.html", PLAIN)

    async def redoc(self, exchange: Exchange) -> Response:
        """Redoc."""
        return await self._reply(exchange, "redoc.html", self._redoc_policy)

    async def file(self, exchange: Exchange) -> Response:
        """One of FILES."""
        assert exchange.route is not None
        return await self._reply(exchange, exchange.route.pattern.removeprefix(FOLDER), PLAIN)

    async def _reply(self, exchange: Exchange, name: str, headers: Fields) -> Response:
        asset = self._files.get(name)
        if asset is None:
            asset = self._files[name] = await self._app.off_loop(functools.partial(_read, name))
        return asset.reply(exchange, headers)


def _read(name: str) -> Asset:
    if name != "guarded.html":
        return Asset.read(name)
    return Asset.of(name, Asset.read("home.html").content.replace(b"data-guarded=no", b"data-guarded=yes"))


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
