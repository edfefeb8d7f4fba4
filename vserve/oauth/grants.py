"""What the issuer's scopes open here, and the flow by which a browser gets a token.  Pure; needs no extra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from vserve.errors import StartupError

MAX_SCOPES = 64


@dataclass(frozen=True, slots=True)
class Grants:
    """opens: each scope of the issuer that counts here, with the scopes of this server it stands for."""

    opens: Mapping[str, frozenset[str]]

    @classmethod
    def parse(cls, words: Iterable[str], known: frozenset[str]) -> Grants:
        """words: ``theirs=ours``, or ``ours`` where both have one name; ours is one of known.

        Raises StartupError, one line, for any other word and where there is none.
        """
        opens: dict[str, frozenset[str]] = {}
        for word in words:
            theirs, _, ours = word.rpartition("=")
            theirs = theirs or ours
            # RFC 6749 3.3: what a scope may be made of.
            legal = all("!" <= char <= "~" and char not in '"\\' for char in theirs)
            if ours not in known or not theirs or not legal:
                names = ", ".join(sorted(known))
                raise StartupError(f"--oauth2-scopes: {word!r} is not SCOPE=OURS with OURS one of {names}")
            opens[theirs] = opens.get(theirs, frozenset()) | {ours}
        if not 0 < len(opens) <= MAX_SCOPES:
            raise StartupError(f"--oauth2-scopes: names {len(opens)} scopes; at least 1 and at most {MAX_SCOPES}")
        return cls(opens)

    def of(self, scopes: Iterable[str]) -> frozenset[str]:
        """What a token with these scopes of the issuer may do here."""
        return frozenset[str]().union(*(self.opens.get(scope, frozenset()) for scope in scopes))

    def that_open(self, ours: str) -> tuple[str, ...]:
        """The issuer's scopes of which one is enough for ours."""
        return tuple(theirs for theirs, opened in self.opens.items() if ours in opened)


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an access token speaks for.  scopes: those of this server."""

    name: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Flow:
    """The authorization code flow as /openapi.json describes it (RFC 6749 4.1)."""

    authorization_url: str
    token_url: str
    grants: Grants


def check_url(flag: str, url: str) -> str:
    """The URL as given.  Raises StartupError unless it is https, or http to this very machine."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
        parts.port  # noqa: B018  raises for one out of range
    except ValueError:
        parts, plain = urlsplit(""), False
    good = all("!" <= char <= "~" and char not in "\"'<>;,\\" for char in url)
    if not good or not parts.hostname or parts.username is not None or not (plain or parts.scheme == "https"):
        raise StartupError(f"{flag}: {url!r} is not an https:// address")
    return url
