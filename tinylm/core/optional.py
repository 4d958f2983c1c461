"""Packages that only some runs need.

They are imported when they are needed; where one is missing, the error names the extra of tinylm
that installs it.
"""

import importlib
from typing import Any

from tinylm.core.errors import UserError


def optional_module(name: str, extra: str) -> Any:
    """Return the module `name`; raise UserError naming tinylm's `extra` where it isn't
    installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"this needs the package {package}: pip install 'tinylm[{extra}]'."
        ) from error
