"""Uploads in a thread: one at a time, and of those waiting only the newest, which supersedes the others."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.contents import Contents


class Uploads:
    """Uploads of one training.

    Args:
        upload: uploads contents completely.
    """

    def __init__(self, upload: Callable[[Contents], None]) -> None:
        self._upload = upload
        self._changed = threading.Condition()
        self._waiting: Contents | None = None
        self._busy = False
        self._outcomes: list[UserError | None] = []
        self._last: UserError | None = None

    def start(self, contents: Contents) -> None:
        """Upload this when the current upload has ended."""
        with self._changed:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = contents
            if self._busy:
                return
            self._busy = True
        # A daemon: a rank that fails must not stay alive to upload.
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

    def outcomes(self) -> list[UserError | None]:
        """The errors (or None) of uploads that have ended since the last call, in order."""
        with self._changed:
            found, self._outcomes = self._outcomes, []
        return found

    def wait(self) -> UserError | None:
        """Wait until no upload is running; return the error of the last one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            return self._last

    def _run(self) -> None:
        while True:
            with self._changed:
                contents, self._waiting = self._waiting, None
                if contents is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            outcome = self._one(contents)
            with self._changed:
                self._last = outcome
                self._outcomes.append(outcome)

    def _one(self, contents: Contents) -> UserError | None:
        try:
            self._upload(contents)
        except UserError as error:
            return error
        except Exception as error:  # whatever a store's client raises, training goes on
            return UserError(f"the upload failed: {type(error).__name__}: {error}")
        finally:
            contents.close()
        return None
