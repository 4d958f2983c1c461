"""How a config section declares a setting: default, one line of help, and whether it changes the numbers.

Each room owns the dataclass of its section and writes its fields with `setting`. An *identity* setting changes
what a run computes, so a run is never resumed with another value; a *free* one (mesh, cadences, writers) may change.
Sections go to JSON and back by `to_dict` and `from_dict`, which know tuples and unknown keys.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tinylm.core.errors import UserError

T = TypeVar("T")


def setting(default: Any, doc: str, *, free: bool = False) -> Any:
    """Declare one config field: its only default, its help line, and whether a resumed run may change it."""
    return dataclasses.field(default=default, metadata={"doc": doc, "free": free})


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (dotted key, field, value) for every setting of a section and of the sections inside it."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def differing_settings(section: Any, other: Any, decisive: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """Return (key, value, other value) of the settings in which two sections of one type differ.

    Free settings count only where `decisive` names them.
    """
    pairs = zip(settings_of(section), settings_of(other), strict=True)
    return [
        (key, a, b)
        for (key, field, a), (_, _, b) in pairs
        if a != b and (key in decisive or not field.metadata["free"])
    ]


def to_dict(section: Any) -> dict[str, Any]:
    """Return a section as nested plain values, ready for JSON."""
    return dataclasses.asdict(section)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Return a section of type `cls` from nested plain values; raise UserError for a key it doesn't have, or a value of
    another type than its default's.
    """
    if not isinstance(values, dict):
        raise UserError(f"config.json: {cls.__name__} is {values!r:.60}, no object.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"config.json: {cls.__name__} has no setting {name!r}{nearest(name, fields)}.")
        section: Any = fields[name].default_factory
        if section is not dataclasses.MISSING:
            arguments[name] = from_dict(section, value)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
            wanted = type(fields[name].default)
            if not isinstance(arguments[name], int | float if wanted is float else wanted):
                raise UserError(f"config.json: {cls.__name__}.{name} is {value!r:.60}, no {wanted.__name__}.")
    return cls(**arguments)


def nearest(name: str, known: Any) -> str:
    """Return "; did you mean X?" for the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
