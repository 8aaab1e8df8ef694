"""The copies of one training's checkpoints in its run's storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.background import Uploads
from cnn2gnn_dist.run_storage.session import RunStorage
from cnn2gnn_dist.run_storage.store import TakenOver, file_name

CHECKPOINTS = "checkpoints"


class TrainingCopies:
    """The copies of one training's checkpoints, as every rank's ``Checkpoints`` sees them.

    Args:
        storage: on rank 0; None on others, of whose methods only ``send`` is called.
        folder: the stage's.
        url: of the storage.
    """

    def __init__(self, storage: RunStorage | None, folder: Path, url: str = "") -> None:
        self._storage, self._unit, self._url = storage, folder.name, url.rstrip("/")

    def start(self) -> str | None:
        """Start to copy what is complete; return why that is impossible, if it is."""
        assert self._storage is not None
        try:
            self._storage.upload(self._unit)
        except OSError as error:
            return str(error)
        return None

    def outcomes(self) -> list[str | None]:
        """For each copy that has ended since the last call, in order: why it failed, or None.

        Raises:
            TakenOver: another run writes into the storage now.
        """
        found = self._uploads.outcomes() if self._uploads else []
        for one in found:
            if isinstance(one, TakenOver):
                raise one
        return [_text(one) for one in found]

    def wait(self) -> str | None:
        """Wait for all copies; return why the last one failed, if it did."""
        return _text(self._uploads.wait()) if self._uploads else None

    def send(self, checkpoint: str, path: Path, file: tuple[str, int, str]) -> None:
        """Copy a file of a checkpoint from a host that has a folder of its own; a record may name it later.

        Raises:
            UserError: it can't be written.
        """
        name, _, sha = file
        target = file_name(self._unit, f"{CHECKPOINTS}/{checkpoint}/{name}", sha)
        urls.remote_files().send(f"{self._url}/{target}", path)

    def note_sent(self, checkpoint: str, files: Sequence[tuple[str, int, str]]) -> None:
        """Record files of a complete checkpoint that other hosts have copied."""
        assert self._storage is not None
        sent = self._storage.sent.setdefault(self._unit, {})
        for name, size, sha in files:
            sent[f"{CHECKPOINTS}/{checkpoint}/{name}"] = (size, sha)

    @property
    def _uploads(self) -> Uploads | None:
        assert self._storage is not None
        return self._storage.uploads.get(self._unit)


def _text(error: UserError | None) -> str | None:
    return None if error is None else f"{error.what} ({error.where})"
