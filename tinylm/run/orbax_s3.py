"""Checkpoints in s3://: what Orbax (0.11.34 to 0.12.8) lacks for them.

Orbax writes its small files through epath, and arrays through TensorStore, both of which know
s3://. But one function of its own says for TensorStore where arrays are. It knows disks and gs://
alone, and no option leads to it. So it is wrapped here: for a folder in s3:// it is asked for the
folder of the same name in gs://, and in what it returns the service is replaced.

All else is public: that a step counts as written by its last file, since nothing in a bucket can be
renamed, is an option of Orbax.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from tinylm.core import buckets
from tinylm.core.errors import UserError

_MODULE = "orbax.checkpoint._src.serialization.tensorstore_utils"
_FUNCTION = "build_kvstore_tspec"


@functools.cache
def enable() -> None:
    """Have Orbax know s3://, from now on in this process.

    Raises:
      UserError: the version of Orbax that is installed says in another way where arrays are.
    """
    import orbax.checkpoint as ocp

    module = importlib.import_module(_MODULE)
    extended = _extended(getattr(module, _FUNCTION, None))
    try:
        spec = extended("s3://bucket/folder")
        is_known = spec["base"] == buckets.store_spec("s3://bucket/folder")
    except (TypeError, ValueError, LookupError):
        is_known = False
    if not is_known:
        raise UserError(
            f"checkpoints can't be written to s3:// by orbax-checkpoint {ocp.__version__}; install "
            "0.12.8, or set checkpoint.dir to a disk that all hosts share."
        )
    setattr(module, _FUNCTION, extended)


def _extended(build: Any) -> Callable[..., Any]:
    """Return Orbax's function in a form that takes folders in s3:// too."""

    def build_for_all(directory: str, *args: Any, **options: Any) -> Any:
        scheme, _, place = directory.partition("://")
        if scheme != "s3":
            return build(directory, *args, **options)
        return _in_s3(build(f"gs://{place}", *args, **options))

    return build_for_all


def _in_s3(spec: Any) -> Any:
    """Return what Orbax gives TensorStore, with the same places in s3:// instead of gs://."""
    match spec:
        case {"bucket": str(bucket), "path": str(path)}:
            return buckets.store_spec(f"s3://{bucket}/{path}")
        # Before 0.12 it was an address in one piece.
        case str() if spec.startswith("gs://"):
            return buckets.store_spec(spec.replace("gs://", "s3://", 1))
        case dict():
            return {name: _in_s3(value) for name, value in spec.items()}
        case list():
            return [_in_s3(value) for value in spec]
    return spec
