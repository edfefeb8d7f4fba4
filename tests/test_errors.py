"""The error shape, and the shortened echo of a client's value."""

from __future__ import annotations

import pytest

from vserve import errors
from vserve.errors import ApiError, BadRequest, MethodNotAllowed, RateLimited, Unauthorized, shorten


def test_an_error_has_the_shape_that_clients_read() -> None:
    assert BadRequest("no", param="n").body() == {
        "error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}
    }


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (BadRequest("x"), ()),
        (RateLimited("x", retry_after_s=3), (("retry-after", "3"),)),
        (BadRequest("x", close=True), (("connection", "close"),)),
        (Unauthorized("x"), (("www-authenticate", "Bearer"),)),
        (MethodNotAllowed("x", allow=("GET", "HEAD")), (("allow", "GET, HEAD"),)),
    ],
)
def test_an_error_carries_its_header_fields(error: ApiError, headers: tuple[tuple[str, str], ...]) -> None:
    assert error.headers() == headers


def test_every_status_has_one_class_and_one_type() -> None:
    family = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ApiError)]
    concrete = [kind for kind in family if kind is not ApiError]
    assert len({kind.status for kind in concrete}) == len(concrete)
    assert len({kind.type for kind in concrete}) == len(concrete)


@pytest.mark.parametrize("value", ["a" * 10**7, b"\x00" * 10**6, list(range(10**6)), 10**150, "\n\x1b[31m", None])
@pytest.mark.promise("input: long echoes", "input: control characters")
def test_a_repeated_value_is_short_and_printable(value: object) -> None:
    text = shorten(value)
    assert len(text) <= errors.ECHO_LIMIT
    assert text.isprintable()
