"""Edge: what stands between the sockets and the routes, as the Config has it: limits, TLS, keys, CORS,
access log, response store.

Made before anything listens, so that a bad file or flag ends the start.  SIGHUP reads the files again.  L only.
"""

from __future__ import annotations

import logging
import signal
import ssl
import sys
from asyncio import AbstractEventLoop
from typing import TYPE_CHECKING

from vserve.api.access import SCOPES, Keys
from vserve.api.cors import Cors
from vserve.api.key_file import read_allowance, read_keys
from vserve.config import Config
from vserve.errors import StartupError
from vserve.http.access_log import AccessWriter
from vserve.http.limits import Limits
from vserve.http.tls import Tls, TlsFiles
from vserve.oauth.grants import Flow, Grants, check_url
from vserve.store.memory import MemoryStore
from vserve.store.record import Bounds, Store
from vserve.store.sqlite import SqliteStore

if TYPE_CHECKING:  # the extra
    from vserve.oauth.issuer import IssuerKeys

log = logging.getLogger("vserve")


class Edge:
    """The parts; those not asked for are None."""

    def __init__(self, config: Config, keys: Keys) -> None:
        """keys: takes the named ones.  Raises StartupError, one line, for files and flags that cannot be used."""
        self._key_file = config.api_key_file
        self._keys = keys
        self._tls = _tls(config)
        if self._key_file is not None:
            keys.name(read_keys(self._key_file))
        self._issuer = _issuer(config, keys)
        self.cors = _cors(config)
        self.access_log = AccessWriter(sys.stderr.write) if config.access_log else None

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        return self._tls.context if self._tls is not None else None

    def watch(self, loop: AbstractEventLoop) -> None:
        """Begin to fetch the issuer's keys, and reload on SIGHUP; with nothing to reload it ends nothing either."""
        if self._issuer is not None:
            self._issuer.start()
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def stop(self) -> None:
        """The server ends."""
        if self._issuer is not None:
            self._issuer.stop()

    def reload(self) -> None:
        """Read keys and certificates again; of each, what cannot be used leaves the old in place and one line."""
        if self._key_file is None and self._tls is None:
            log.info("SIGHUP: there is neither an --api-key-file nor an --ssl-certfile to read again")
        if self._key_file is not None:
            try:
                keys = read_keys(self._key_file)
                self._keys.name(keys)
                log.info("reloaded %d API keys", len(keys))
            except StartupError as error:
                log.error("the API keys stay as they were: %s", error)
        if self._tls is not None:
            try:
                self._tls.reload()
                log.info("reloaded the certificate")
            except StartupError as error:
                log.error("the certificate stays as it was: %s", error)


def limits(config: Config) -> Limits:
    """The bounds of the wire half."""
    return Limits(
        request_line_bytes=config.max_request_line_bytes,
        header_bytes=config.max_header_bytes,
        header_count=config.max_header_fields,
        tls_handshake_s=config.tls_handshake_timeout_s,
        body_bytes=config.body_limit_bytes,
        in_flight_bytes=config.max_bytes_in_flight,
        pipelined_requests=config.max_pipelined,
        connections=config.max_connections,
        # All clients of a Unix socket have one address.
        connections_per_address=config.max_connections_per_address if config.uds is None else None,
        header_s=config.header_timeout_s,
        body_idle_s=config.body_timeout_s,
        body_total_s=config.body_total_timeout_s,
        keep_alive_s=config.keep_alive_timeout_s,
        write_stall_s=config.write_timeout_s,
    )


def response_store(config: Config) -> Store:
    """Where responses are kept.  Raises StartupError for a file that cannot be used."""
    bounds = Bounds(config.response_store_entries, config.response_store_bytes, config.response_store_age_s)
    return MemoryStore(bounds) if config.response_store is None else SqliteStore(config.response_store, bounds)


def root_path(config: Config) -> str:
    """The prefix as the router takes it, "" for none.  Raises StartupError for one that no path can begin with."""
    path = (config.root_path or "").rstrip("/")
    if path and (not path.startswith("/") or "//" in path or not all("!" <= c <= "~" and c not in "?#%" for c in path)):
        raise StartupError(f"--root-path: {path!r} is not a path such as /llm")
    return path


def flow(config: Config) -> Flow | None:
    """How a browser gets an access token.  Raises StartupError for flags that make no flow."""
    urls = (config.oauth2_authorization_url, config.oauth2_token_url)
    if urls == (None, None):
        return None
    if urls[0] is None or urls[1] is None:
        raise StartupError("--oauth2-authorization-url and --oauth2-token-url go together")
    if config.oauth2_issuer is None:
        raise StartupError("--oauth2-authorization-url needs --oauth2-issuer: whose tokens would be taken?")
    return Flow(
        check_url("--oauth2-authorization-url", urls[0]),
        check_url("--oauth2-token-url", urls[1]),
        Grants.parse(config.oauth2_scopes, SCOPES),
    )


def _issuer(config: Config, keys: Keys) -> IssuerKeys | None:
    """The issuer's keys, not yet fetched; its tokens are then trusted."""
    issuer, audience, jwks_url = config.oauth2_issuer, config.oauth2_audience, config.oauth2_jwks_url
    if issuer is None:
        given = (audience, jwks_url, config.oauth2_quotas)
        for flag, value in zip(("--oauth2-audience", "--oauth2-jwks-url", "--oauth2-quotas"), given, strict=True):
            if value not in (None, ()):
                raise StartupError(f"{flag} needs --oauth2-issuer")
        return None
    check_url("--oauth2-issuer", issuer)
    if audience is None:
        raise StartupError("--oauth2-issuer needs --oauth2-audience: else tokens for other services would do here")
    if jwks_url is not None:
        check_url("--oauth2-jwks-url", jwks_url)
    grants = Grants.parse(config.oauth2_scopes, SCOPES)
    try:
        each = read_allowance(config.oauth2_quotas)
    except StartupError as error:
        raise StartupError(f"--oauth2-quotas: {error}") from None
    try:
        from vserve.oauth.issuer import IssuerKeys
        from vserve.oauth.tokens import Tokens
    except ImportError as error:
        raise StartupError(f"--oauth2-issuer needs {error.name}: pip install 'vserve[oauth]'") from None
    found = IssuerKeys(issuer, jwks_url)
    keys.trust(Tokens(found, issuer, audience, grants), each)
    return found


def _tls(config: Config) -> Tls | None:
    if config.ssl_certfile is not None:
        return Tls(TlsFiles(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs))
    for flag, value in (("--ssl-keyfile", config.ssl_keyfile), ("--ssl-ca-certs", config.ssl_ca_certs)):
        if value is not None:
            raise StartupError(f"{flag} needs --ssl-certfile")
    return None


def _cors(config: Config) -> Cors | None:
    cors = Cors(
        config.allowed_origins,
        config.allowed_methods,
        config.allowed_headers,
        credentials=config.allow_credentials,
    )
    return cors if config.allowed_origins else None
