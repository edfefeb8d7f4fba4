"""The life of a connection: one enum, one table.  What is not listed cannot happen.

Knows neither bytes nor clocks; connection.py moves along this table and arms the timer of each state.
"""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """Where a connection is; its timer in brackets.  Integers, because they are hashed for every request."""

    IDLE = 0  # between requests [keep_alive_s]
    HEAD = 1  # part of a head has come [header_s from its first byte]
    BODY = 2  # the head is accepted, content is coming [body_idle_s, body_total_s]
    HANDLING = 3  # the request is whole, no byte of its reply has been written [write_stall_s while bytes wait]
    STREAMING = 4  # a reply is being streamed [write_stall_s while bytes wait]
    CLOSING = 5  # the last reply is made; it is flushed, then the connection ends [linger_s, write_stall_s]
    CLOSED = 6  # the transport is gone


class Cause(enum.IntEnum):
    """What moves a connection."""

    BYTES = 0  # the first bytes of a head
    ACCEPTED = 1  # a head whose content follows
    WHOLE = 2  # the request is complete
    STREAMED = 3  # the head of a streamed reply went out
    ANSWERED = 4  # the reply is complete and the connection persists
    LAST = 5  # no further request is read: refusal, close asked for, timeout, drain, peer gone
    LOST = 6  # the transport reports the end


NEXT: dict[tuple[State, Cause], State] = {
    (State.IDLE, Cause.BYTES): State.HEAD,
    (State.IDLE, Cause.WHOLE): State.HANDLING,  # a known head without content, all in one read
    (State.HEAD, Cause.ACCEPTED): State.BODY,
    (State.HEAD, Cause.WHOLE): State.HANDLING,
    (State.BODY, Cause.WHOLE): State.HANDLING,
    (State.HANDLING, Cause.STREAMED): State.STREAMING,
    (State.HANDLING, Cause.ANSWERED): State.IDLE,
    (State.STREAMING, Cause.ANSWERED): State.IDLE,
    **{(state, Cause.LAST): State.CLOSING for state in State if state < State.CLOSING},
    **{(state, Cause.LOST): State.CLOSED for state in State if state < State.CLOSED},
}
