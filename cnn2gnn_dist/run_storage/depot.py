"""What hosts without a shared folder leave for each other in a run's storage, and fetch from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from cnn2gnn_dist.data.storage import transfer, urls
from cnn2gnn_dist.data.storage.transfer import RemoteFiles
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.store import BRIEF, EXCHANGE, OWNER
from cnn2gnn_dist.runtime.shared_files.exchange_by_store import Content, Unfit, Write

Objects = Callable[[], dict[tuple[int, str], str]]


class StoreDepot:
    """The depot of one run in its storage, as one rank sees it.

    Args:
        url: of the storage.
        owner: identifies the run's writer, so that runs which follow each other don't share objects.
        objects: on rank 0, URLs of what the storage keeps anyway, by bytes and SHA-256.
    """

    def __init__(self, url: str, owner: str, objects: Objects = dict) -> None:
        self.url, self._owner, self._objects = url.rstrip("/"), owner, objects
        run = hashlib.sha256(owner.encode()).hexdigest()[:12]
        self._folder = f"{self.url}/{EXCHANGE}/{run}"
        self._files = urls.remote_files()

    def check(self, rank: int) -> None:
        """Check that this host reaches the storage that rank 0 has opened, and can write there.

        Raises:
            UserError: it does not.
        """
        files, probe = RemoteFiles(BRIEF), f"{self._folder}/probe-{rank}"
        with transfer.explained("run.storage"):
            there = f"{self.url}/{OWNER}"
            text = files.read_range(there, 0, files.file_info(there).bytes)
            if text.decode(errors="replace") != json.dumps(self._owner):
                raise UserError(
                    "this host does not see the storage that rank 0 has opened, or another run has been "
                    "started with it",
                    where=there,
                    remedy="give all hosts the same access to one store, and the storage to one run",
                )
            files.send(probe, b"")
            files.remove(probe)

    def kept(self, wanted: Mapping[str, Content]) -> dict[str, str]:
        """By name, objects with these contents that stay in the store anyway; called on rank 0 only."""
        there = self._objects()
        found = ((name, there.get((one.size, one.sha256))) for name, one in wanted.items())
        return {name: url for name, url in found if url is not None}

    def leave(self, content: Content, source: bytes | Path) -> str:
        """Write an object; return its URL.

        Raises:
            UserError: it can't be written.
        """
        url = f"{self._folder}/{content.sha256}"
        self._files.send(url, source)
        return url

    def fetch(self, name: str, size: int, write: Write) -> None:
        """Pass the ``size`` bytes of an object to ``write``, in order.

        Raises:
            Unfit: it is missing, or has another size.
            UserError: it can't be read, or the disk is full.
        """  # noqa: DOC501
        try:
            there = self._files.file_info(name).bytes
        except UserError as error:
            if "does not exist" not in error.what:
                raise
            raise _unfit("is missing", name) from None
        if there != size:
            raise _unfit(f"has {there:,} bytes instead of {size:,}", name)
        self._files.fetch(name, 0, size, write)

    def remove(self, name: str) -> None:
        """Remove an object that ``leave`` has written.

        Raises:
            UserError: it can't be removed.
        """
        self._files.remove(name)


def _unfit(how: str, url: str) -> Unfit:
    return Unfit(
        f"an object of the run's storage {how}",
        where=url,
        remedy="if another run has been started with this storage, stop one of the two; the same command "
        "continues from what is complete",
    )
