"""JSON from strangers: no duplicate keys, no NaN, no bottomless nesting, and every field's type checked."""

from __future__ import annotations

import json
import math
from typing import Any

from dist_lowbit.core.errors import CheckpointError

DEPTH_LIMIT = 64  # far below what the interpreter's stack allows; ours has 6 levels


class _Refused(ValueError):
    """What the hooks below raise; every other ValueError comes from the json module."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Refused(f"key {key!r:.80} stands there twice")
        result[key] = value
    return result


def _constant(text: str) -> float:
    raise _Refused(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text:.40} is out of range")
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise CheckpointError(f"{where} is nested too deeply; expected at most {DEPTH_LIMIT} levels")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`; anything else is a CheckpointError that begins with `where`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply; expected at most {DEPTH_LIMIT} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits, _Refused
        raise CheckpointError(f"{where} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}; expected an object")
    _check_depth(value, where)
    return value


class Fields:
    """A JSON object whose fields are taken one by one, each with its type; `done` refuses what is left over."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is {value!r:.80}; expected an object")
        self._rest: dict[str, Any] = dict(value)
        self.where = where

    def _take(self, key: str, kind: type, expected: str) -> Any:
        if key not in self._rest:
            raise CheckpointError(f"{self.where} has no {key!r}; expected {expected}")
        value = self._rest.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where} has {key!r} {value!r:.80}; expected {expected}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """Take an integer in [low, high]."""
        value: int = self._take(key, int, f"an integer from {low} to {high}")
        if not low <= value <= high:
            raise CheckpointError(f"{self.where} has {key!r} {value!r:.80}; expected {low} to {high}")
        return value

    def optional(self, key: str, low: int, high: int) -> int | None:
        """Take an integer in [low, high], or null."""
        if key in self._rest and self._rest[key] is None:
            del self._rest[key]
            return None
        return self.integer(key, low, high)

    def text(self, key: str) -> str:
        """Take a string."""
        value: str = self._take(key, str, "a string")
        return value

    def array(self, key: str) -> list[Any]:
        """Take an array."""
        value: list[Any] = self._take(key, list, "an array")
        return value

    def object(self, key: str) -> dict[str, Any]:
        """Take an object."""
        value: dict[str, Any] = self._take(key, dict, "an object")
        return value

    def integers(self, key: str, low: int, high: int, at_most: int) -> tuple[int, ...]:
        """Take an array of at most `at_most` integers in [low, high]."""
        values = self.array(key)
        good = all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in values)
        if not good or len(values) > at_most:
            raise CheckpointError(
                f"{self.where} has {key!r} {values!r:.80}; expected at most {at_most} integers from {low} to {high}"
            )
        return tuple(values)

    def done(self) -> None:
        """Refuse keys that nobody took."""
        if self._rest:
            raise CheckpointError(f"{self.where} has an unknown key {next(iter(self._rest))!r:.80}")
