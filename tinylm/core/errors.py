"""What can go wrong for a user, and the exit code that tells it apart.

Every mistake ends in one clear line: what was required, what was found, which key or flag to
change. Errors of this module carry that line and the exit code; `tinylm.cli.run` prints the line
and exits with the code. Any other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in flags, config or data: one line that says what to change. Exit code 2."""

    exit_code = 2


class NumericError(UserError):
    """Loss or gradient stopped being finite. Exit code 3."""

    exit_code = 3


class HangError(UserError):
    """A process or peer stopped making progress. Exit code 4."""

    exit_code = 4


class StorageError(UserError):
    """A disk or bucket could not be written or read back. Exit code 5."""

    exit_code = 5


class Preempted(UserError):
    """The run was asked to stop, has saved, and goes on with the same command. Exit code 75."""

    exit_code = 75


class PeerLost(UserError):
    """Another process of the job died. Exit code 6."""

    exit_code = 6


# After these the same command goes on from the last checkpoint, so launchers start it again: a
# hang, a lost peer, a stop on request. A process that JAX aborts (134) or the system kills (137)
# has lost its peer, or is the lost one.
RESUMABLE = frozenset(error.exit_code for error in (HangError, PeerLost, Preempted))


def one_line(error: BaseException) -> str:
    """Return what an error of a library says, in one line of at most 200 characters."""
    # Of an OSError the text without its number and file, which our line names already.
    reason = getattr(error, "strerror", None) or str(error)
    line = " ".join(str(reason).split())
    return line[:200] or type(error).__name__
