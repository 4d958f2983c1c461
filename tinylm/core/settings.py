"""How a config section declares a setting: default, one line of help, and whether it changes the numbers.

Each room owns the dataclass of its section and writes its fields with `setting`. An *identity* setting changes
what a run computes, so a run is never resumed with another value; a *free* one (mesh, cadences, writers) may change.
"""

import dataclasses
from typing import Any


def setting(default: Any, doc: str, *, free: bool = False) -> Any:
    """Declare one config field: its only default, its help line, and whether a resumed run may change it."""
    return dataclasses.field(default=default, metadata={"doc": doc, "free": free})
