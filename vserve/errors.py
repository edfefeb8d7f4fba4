"""The error family: every HTTP status the server can answer with, and the one-line start-up failure.

Nothing else in the project names an HTTP status for a failure.  An ``ApiError`` is raised before anything is queued,
or handed to a stream that is already open; it never carries a path, an address or a stack.
"""

from __future__ import annotations

ECHO_LIMIT = 200
"""Most characters of a client's own value that an error message repeats."""


class ApiError(Exception):
    """A failure that a client sees, with its HTTP status.

    message names the field, the value (shortened with ``shorten``) and the limit; param is the JSON path of the
    field, or None; retry_after_s fills Retry-After; close asks for ``Connection: close``.
    """

    status = 500
    type = "InternalServerError"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.close = close

    def body(self) -> dict[str, dict[str, str | int | None]]:
        """The JSON object of the error shape: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Header fields that belong to this error, names in lower case."""
        fields: list[tuple[str, str]] = []
        if self.retry_after_s is not None:
            fields.append(("retry-after", str(self.retry_after_s)))
        if self.close:
            fields.append(("connection", "close"))
        return tuple(fields)


class BadRequest(ApiError):
    status = 400
    type = "BadRequestError"


class Unauthorized(ApiError):
    """401; challenge: what WWW-Authenticate says beside the scheme (RFC 6750 section 3)."""

    status = 401
    type = "AuthenticationError"

    def __init__(self, message: str, *, challenge: str = "") -> None:
        super().__init__(message)
        self.challenge = challenge

    def headers(self) -> tuple[tuple[str, str], ...]:
        return (*super().headers(), ("www-authenticate", f"Bearer {self.challenge}".rstrip()))


class PermissionDenied(ApiError):
    """403; challenge: what WWW-Authenticate says to the bearer of a token, None for a key."""

    status = 403
    type = "PermissionDeniedError"

    def __init__(self, message: str, *, challenge: str | None = None) -> None:
        super().__init__(message)
        self.challenge = challenge

    def headers(self) -> tuple[tuple[str, str], ...]:
        challenge = () if self.challenge is None else (("www-authenticate", f"Bearer {self.challenge}"),)
        return (*super().headers(), *challenge)


class NotFound(ApiError):
    status = 404
    type = "NotFoundError"


class MethodNotAllowed(ApiError):
    """405; allow lists the methods the path does serve."""

    status = 405
    type = "MethodNotAllowedError"

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> tuple[tuple[str, str], ...]:
        return (*super().headers(), ("allow", ", ".join(self.allow)))


class RequestTimeout(ApiError):
    status = 408
    type = "RequestTimeoutError"


class Conflict(ApiError):
    status = 409
    type = "ConflictError"


class PayloadTooLarge(ApiError):
    status = 413
    type = "PayloadTooLargeError"


class UriTooLong(ApiError):
    status = 414
    type = "UriTooLongError"


class UnsupportedMediaType(ApiError):
    status = 415
    type = "UnsupportedMediaTypeError"


class ExpectationFailed(ApiError):
    status = 417
    type = "ExpectationFailedError"


class RateLimited(ApiError):
    status = 429
    type = "RateLimitError"


class HeadersTooLarge(ApiError):
    status = 431
    type = "HeadersTooLargeError"


class InternalError(ApiError):
    status = 500
    type = "InternalServerError"


class NotImplementedMethod(ApiError):
    status = 501
    type = "NotImplementedError"


class Unavailable(ApiError):
    status = 503
    type = "ServiceUnavailableError"


class DeadlineExceeded(ApiError):
    status = 504
    type = "TimeoutError"


class HttpVersionNotSupported(ApiError):
    status = 505
    type = "HttpVersionNotSupportedError"


class StartupError(Exception):
    """The server cannot start as asked: one line that names the thing and what would work; exit code 2."""


class EngineDied(Exception):
    """The step loop ended; no request can be served any more.  Reaches every open and later stream."""


class EngineStalled(EngineDied):
    """The step loop hangs, and the operator wants the process to end then."""


def shorten(value: object, limit: int = ECHO_LIMIT) -> str:
    """The value as it may stand in a message: escaped repr, at most limit characters, cut marked with an ellipsis."""
    # Cut before repr: a megabyte of input must not be escaped only to be thrown away.
    text = repr(value[: limit + 1] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
