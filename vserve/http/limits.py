"""Limits: every bound the wire half keeps, in one frozen value.

Owns the numbers and their defaults; knows nothing of what enforces them.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 2**10
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one connection and on all of them.  Sizes in bytes, times in seconds.

    request_line_bytes   without its CRLF -> 414
    header_bytes, header_count   the whole field section, also of trailers -> 431
    body_bytes           one request's content -> 413
    in_flight_bytes   content held for all requests together, and what waits for clients that are behind; above 90 % of
                      it new work gets 503, a body beyond it too, and who is behind when it is passed is cut off
    chunk_line_bytes, chunk_extension_bytes   one chunk-size line; all extensions of one body -> 400
    pipeline_bytes       read ahead while a reply is being made; above it reading pauses
    pipelined_requests   waiting behind the one being answered; with more the connection ends after its reply
    turn_events          parser events served before other connections get a turn of the loop
    connections          open ones, those in a TLS handshake too; above it only vital routes are served, and the
                         connection ends with a 503
    spare_connections    how many above `connections` are still told so; the rest are dropped at once
    connections_per_address   the same for one peer address; None is no bound
    header_s             from a request's first byte to the end of its head -> 408
    body_idle_s, body_total_s   silence within, and whole time of, a body -> 408
    keep_alive_s         silence between requests: the connection is closed
    write_stall_s        a peer that takes too little of what waits for it for so long is dropped
    write_high_bytes, write_low_bytes   marks of the transport's buffer between which exchanges stop writing
    stream_buffer_bytes  written to a stream although it was not writable: above it the connection is aborted
    linger_s, linger_bytes   how long and how much is read and thrown away after a refusal, so that the peer sees it
    tls_handshake_s      whole time of a TLS handshake
    """

    request_line_bytes: int = 8 * KIB
    header_bytes: int = 64 * KIB
    header_count: int = 256
    body_bytes: int = 32 * MIB
    in_flight_bytes: int = 512 * MIB
    chunk_line_bytes: int = 256
    chunk_extension_bytes: int = 16 * KIB
    pipeline_bytes: int = 64 * KIB
    pipelined_requests: int = 256
    turn_events: int = 64
    connections: int = 8192
    spare_connections: int = 64
    connections_per_address: int | None = None
    header_s: float = 10.0
    body_idle_s: float = 30.0
    body_total_s: float = 300.0
    keep_alive_s: float = 75.0
    write_stall_s: float = 60.0
    write_high_bytes: int = 64 * KIB
    write_low_bytes: int = 16 * KIB
    stream_buffer_bytes: int = 256 * KIB
    linger_s: float = 5.0
    linger_bytes: int = 64 * MIB
    tls_handshake_s: float = 10.0
