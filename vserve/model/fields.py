"""Typed, bounded reading of the untrusted mappings that describe a model: config.json and GGUF metadata.

Every failure is a ``StartupError`` that names the file, the key, the value (shortened) and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vserve.errors import StartupError, shorten


class Fields:
    """A mapping and the name of where it came from; a value of None counts as absent."""

    __slots__ = ("_values", "_where")

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._values.get(key) is not None

    @property
    def where(self) -> str:
        """What the mapping is called in errors."""
        return self._where

    def with_section(self, key: str, section: Fields) -> Fields:
        """These fields with the mapping of section under key."""
        return Fields({**self._values, key: section._values}, self._where)

    def has_null(self, key: str) -> bool:
        """Whether the key is there with the value null, where a format tells that from an absent key."""
        return key in self._values and self._values[key] is None

    def fail(self, key: str, problem: str) -> StartupError:
        """The error to raise about a key: "config.json: head_dim is 7, must be even"."""
        return StartupError(f"{self._where}: {key} is {shorten(self._values.get(key))}, {problem}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """The integer in low..high; absent: the default, or an error when there is none."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise StartupError(f"{self._where}: {key} is missing")
            return default
        # A float like 4096.0 is not an integer here: no writer of these files makes one.
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"must be an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """The finite number in low..high as a float; absent: the default, or an error when there is none."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise StartupError(f"{self._where}: {key} is missing")
            return default
        # The range is tested before float(): an integer past 1e308 would overflow there.
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return self.number(key, low, high, math.nan) if key in self else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "must be a string")
        return value

    def length(self, key: str) -> int:
        """How many elements the array under key has; 0 when it is absent."""
        value = self._values.get(key)
        if value is None:
            return 0
        if not isinstance(value, list):
            raise self.fail(key, "must be an array")
        return len(value)

    def section(self, key: str) -> Fields | None:
        """The mapping under key; None when it is absent or empty."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        return Fields(value, f"{self._where}: {key}") if value else None

    def mapping(self, key: str) -> Mapping[str, object] | None:
        """The mapping under key as it is, empty or not; None when it is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of at most 4096 integers in low..high; absent: ()."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > 4096:
            raise self.fail(key, "must be a list of at most 4096 integers")
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool) or not low <= item <= high:
                raise self.fail(key, f"must be integers from {low} to {high}")
        return tuple(value)

    def texts(self, key: str, most: int) -> tuple[str, ...] | None:
        """A list of at most `most` strings; None when it is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) for item in value):
            raise self.fail(key, f"must be a list of at most {most} strings")
        return tuple(value)

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        """A list of at most 4096 numbers in low..high; absent: ()."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > 4096:
            raise self.fail(key, "must be a list of at most 4096 numbers")
        for item in value:
            if not isinstance(item, int | float) or isinstance(item, bool) or not low <= item <= high:
                raise self.fail(key, f"must be numbers from {low:g} to {high:g}")
        return tuple(map(float, value))

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, each below vocab_size, duplicates dropped; absent: ()."""
        value = self._values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) > 4096:
            raise self.fail(key, "must be at most 4096 token ids")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise self.fail(key, f"must be token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))
