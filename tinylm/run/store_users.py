"""Whether runs still refer to the token stores in which they noted themselves.

The room of data knows no runs, so its removal of unused stores is given these two questions.
"""

from tinylm.core.errors import UserError
from tinylm.run.folder import RunFolder


def refers_to(workdir: str, store_name: str) -> bool:
    """Say whether a run refers to the store of a name."""
    try:
        folder = RunFolder(workdir)
        if not folder.exists():
            return False
        return store_name in folder.read_config().get("token_stores", {})
    except (UserError, OSError):
        # A run that can't be read, as one in a bucket out of reach, may still need its store.
        return True


def is_run_here(workdir: str) -> bool:
    """Say whether there is a run in a workdir that this machine can see."""
    try:
        return RunFolder(workdir).exists()
    except (UserError, OSError):
        return False
