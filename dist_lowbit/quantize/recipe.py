"""The recipe: which module of a model is stored in which format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dist_lowbit.core.errors import CheckpointError, FormatError, UsageError
from dist_lowbit.formats import Format, lookup
from dist_lowbit.formats.table import check_group_size

_GLOB = frozenset("*?[")
_KEYS = frozenset({"format", "group_size", "modules_to_not_convert"})


def matches(pattern: str, module_name: str) -> bool:
    """Return whether a pattern names a module: a glob over the full name if it holds * ? or [, else a substring."""
    if _GLOB & set(pattern):
        return fnmatchcase(module_name, pattern)
    return pattern in module_name


@dataclass(frozen=True)
class Recipe:
    """One format for a whole model, less the modules that stay in high precision.

    `format`: a name or an alias of formats.FORMATS, kept as the row's own name. `group_size`: elements of K, -1 for
    one group per row, None for the format's default, kept as the number in force. `modules_to_not_convert`: patterns
    for `matches`, none of them empty. Raises FormatError for the first two and UsageError for the patterns.
    """

    format: str
    group_size: int | None = None
    modules_to_not_convert: Sequence[str] = ()

    def __post_init__(self) -> None:
        row = lookup(self.format)
        object.__setattr__(self, "format", row.name)
        object.__setattr__(self, "group_size", check_group_size(row, self.group_size))
        object.__setattr__(self, "modules_to_not_convert", _patterns(self.modules_to_not_convert))

    @property
    def groups(self) -> int:
        """Return the group size in force."""
        assert self.group_size is not None  # __post_init__ has put a number there
        return self.group_size

    def keeps(self, module_name: str) -> bool:
        """Return whether a module stays in high precision."""
        return any(matches(pattern, module_name) for pattern in self.modules_to_not_convert)

    def format_for(self, module_name: str) -> Format | None:
        """Return the format of a module by its full name, or None if it stays in high precision."""
        return None if self.keeps(module_name) else lookup(self.format)

    def unused(self, module_names: Iterable[str]) -> tuple[str, ...]:
        """Return the patterns that match none of the names, so that a caller can warn of a misspelt one."""
        names = list(module_names)
        return tuple(p for p in self.modules_to_not_convert if not any(matches(p, name) for name in names))

    def to_json(self) -> dict[str, object]:
        """Return the recipe as JSON values, for a checkpoint's metadata."""
        return {
            "format": self.format,
            "group_size": self.group_size,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    @classmethod
    def from_json(cls, value: object) -> Recipe:
        """Return the recipe that to_json wrote; anything else is a CheckpointError."""
        if not isinstance(value, Mapping) or value.keys() != _KEYS:
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise CheckpointError(f"the recipe holds {found}; expected an object with {', '.join(sorted(_KEYS))}")
        try:
            return cls(value["format"], value["group_size"], value["modules_to_not_convert"])
        except (FormatError, UsageError) as error:
            raise CheckpointError(f"the recipe cannot be read: {error}") from error


def _patterns(value: object) -> tuple[str, ...]:
    expected = "modules_to_not_convert expects a list of names or globs"
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{expected}, found {value!r}", argument="modules_to_not_convert")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:  # an empty substring would match every module
            raise UsageError(f"{expected}, none of them empty; found {pattern!r}", argument="modules_to_not_convert")
    return patterns
