"""The files of the pages people look at: out of the package, compressed, with a tag by which a browser keeps them.

Owns reading, compressing and conditional requests; which file stands where and under what policy is pages.py's.  What
others wrote lies here compressed (deploy/assets.sh makes it), what we wrote lies here as it is.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

from vserve.api.accept import has_it, takes_gzip
from vserve.http.exchange import Exchange, Fields, Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file.  packed: its content as gzip; both are kept, or whoever has no gzip could keep the server unpacking.

    tag: of the content, without quotes.
    """

    content_type: str
    content: bytes
    packed: bytes
    tag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> Asset:
        """content under a name with one of the known endings."""
        return cls._made(name, content, gzip.compress(content, 9, mtime=0))

    @classmethod
    def read(cls, name: str) -> Asset:
        """The package's file of that name, whether it lies there compressed or not.  Reads; not on the loop."""
        folder = resources.files("vserve.api") / "static"
        packed = folder / f"{name}.gz"
        if packed.is_file():
            data = packed.read_bytes()
            return cls._made(name, gzip.decompress(data), data)
        return cls.of(name, (folder / name).read_bytes())

    @classmethod
    def _made(cls, name: str, content: bytes, packed: bytes) -> Asset:
        return cls(_TYPES[name.rpartition(".")[2]], content, packed, hashlib.sha256(content).hexdigest()[:32])

    def reply(self, exchange: Exchange, headers: Fields) -> Response:
        """The file for this request, or 304."""
        asked = exchange.head.headers
        zipped = takes_gzip(asked.get("accept-encoding"))
        etag = f'"{self.tag}-gzip"' if zipped else f'"{self.tag}"'
        # no-cache: kept, and asked for each time; the answer is nearly always 304, never a page of an older version.
        kept = (("etag", etag), ("cache-control", "no-cache"), ("vary", "accept-encoding"), *headers)
        if has_it(asked.get("if-none-match"), etag):
            return Response(304, headers=kept)
        if zipped:
            return Response(200, self.packed, self.content_type, (*kept, ("content-encoding", "gzip")))
        return Response(200, self.content, self.content_type, kept)
