"""Errors for the user to fix: what is wrong, where, and the remedy.

How the texts are written, so that they continue the ``cnn2gnn:`` that the command line puts before them:

- ``what``: what is wrong, with the values concerned. It begins in lower case (but for names, such as
  Ray or METIS) and has no full stop; a second thought follows after a colon or a semicolon.
- ``where``: a path, a key, a field or a variable, as it is typed; not a sentence.
- ``remedy``: what to do, as an imperative or a command, in the same form as ``what``. Carried out as
  written, it works (``tests/end_to_end/test_remedies.py``).
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in input, configuration or environment that a person can fix.

    The command line prints it without a traceback and exits with ``exit_code``.

    Args:
        what: what is wrong, in one sentence.
        where: the file, shard, key or configuration field concerned.
        remedy: what to do about it.
    """

    exit_code = 2
    shared = False
    """Whether rank 0 has it too and reports it, so that no other rank does."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing pickle exceptions; keyword-only arguments need help.
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


class Preempted(UserError):
    """Training stopped on request (SIGTERM and the like); the same command resumes."""

    exit_code = 143


class PeerLost(UserError):
    """Another rank died or did not answer in time; the same command resumes."""

    exit_code = 75


class FolderInUse(UserError):
    """Another process holds the lock of the run's folder."""


class PeerFailed(UserError):
    """Another rank ended with an error that its user can't fix: a bug, or no memory on its GPU."""

    exit_code = 1


class ShardChanged(UserError):
    """A shard has changed since it was indexed."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        remedy = remedy or (
            "restore the shard or, if the change is intended, run the same command with --update"
        )
        super().__init__(what, where=where, remedy=remedy)


def _rebuild(cls: type[UserError], what: str, where: str, remedy: str) -> UserError:
    return cls(what, where=where, remedy=remedy)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's message; its type if the message is empty."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
