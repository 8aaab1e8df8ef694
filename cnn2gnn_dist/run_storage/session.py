"""A run between its scratch folder and its storage: what is restored, fetched and stored, and in which order."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage import contents, host_copies
from cnn2gnn_dist.run_storage.background import Uploads
from cnn2gnn_dist.run_storage.contents import Contents
from cnn2gnn_dist.run_storage.store import Record, Store, file_name

_log = logging.getLogger(__name__)

RUN = "run"
"""The unit of the files that belong to no stage."""
RUN_FILES = (ledger.CONFIG, "inputs.json", "results.json", "report.html")
MANIFESTS = "manifest"
"""The stage whose files are always fetched: they are small, and a plan reads them."""
RECORDED = (ledger.DONE, "begin.json")


@dataclass
class RunStorage:
    """One run's storage, which only rank 0 uses.

    Attributes:
        root: the run's folder, on scratch.
        store: where the run is kept.
        scratch: identifies the folder.
        based: for each unit, the digest of the record that the folder's files come from.
        sent: for each unit, bytes and SHA-256 of files that other hosts, with folders of their own, have
            written to the store since the start.
    """

    root: Path
    store: Store
    scratch: str
    based: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, Uploads] = field(default_factory=dict)
    sent: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    _gone: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, url: str) -> RunStorage:
        """Open the storage, become its writer, and restore the run's progress.

        Raises:
            UserError: it can't be used (see ``Store.open``); the folder holds another run, or only a part of
                a run whose rest is in another storage.
        """
        made = cls._of(root, url)
        ledger.check_claim(root)
        made.store.claim()
        durable.create_folder(root)
        if host_copies.is_copy(root):
            host_copies.keep_stored(root, made.store, RUN)
        made._write_note()
        for aside in made._restore():
            _log.warning(
                f"the run has continued elsewhere; its files here are moved to {aside.name}"
            )
        return made

    @classmethod
    def look(cls, root: Path, url: str, view: Path) -> tuple[RunStorage, list[str]]:
        """Restore into ``view`` what ``open`` would restore into ``root``, and write nothing else anywhere.

        Args:
            root: the run's folder; it need not exist.
            url: of its storage.
            view: an empty folder, which gets links to what is in ``root``.

        Returns:
            the storage, whose ``root`` is the view; names of folders in ``root`` that would be moved aside.

        Raises:
            UserError: as ``open``, but the storage need not be writable.
        """
        made = cls._of(root, url)
        if not host_copies.is_copy(root):
            _link(root, view)
        made.root = view
        return made, [aside.name.partition(".old-")[0] for aside in made._restore()]

    @classmethod
    def _of(cls, root: Path, url: str) -> RunStorage:
        store, note = Store.open(url), host_copies.read_note(root)
        host_copies.check_held(root, store)
        if store.records and (root / ledger.CONFIG).is_file() and note.get("url") != store.url:
            raise UserError(
                f"this folder holds another run than {store.url}",
                where=f"run.dir={root}",
                remedy="an empty run.dir, or another run.storage",
            )
        if (
            note.get("url") != store.url
            and (before := held_back(root, _with_notes(root))) is not None
        ):
            raise UserError(
                f"parts of this run are only in {before}, which is not the current run.storage",
                where=f"run.storage={url}",
                remedy=f"run.storage={before}; or copy all of it to {store.url} and name an empty run.dir",
            )
        known = note if note.get("url") == store.url and not note.get(host_copies.COPY) else {}
        scratch = known.get("scratch") or secrets.token_hex(8)
        return cls(root, store, scratch, known.get("based", {}))

    def fetch(self, unit: str, *, resumes: bool = False) -> None:
        """Fetch the missing files of a stage.

        Args:
            unit: its folder.
            resumes: also fetch checkpoints and graphs that only the stage itself resumes from.

        Raises:
            Damaged: one of them is damaged in the storage. When training resumes, a damaged checkpoint is
                only left out: an earlier one takes its place.
            UserError: the storage can't be read, or the disk is full.
        """
        folder = self.root / unit
        entry = ledger.finished(folder)
        outputs = {name for name, _ in entry.outputs} if entry else set()
        names = {n for n in self._absent(unit) if resumes or n in outputs or not _only_to_resume(n)}
        if not names:
            return
        size = sum(self.store.records[unit].files[name].size for name in names)
        _log.info(
            f"fetching {len(names)} files ({size / 1e6:,.1f} MB) from {self.store.url}/{unit}"
        )
        for name, error in sorted(self.store.get(unit, names, folder).items()):
            if not (resumes and name.startswith("checkpoints/step-")):
                raise error
            _log.warning(f"checkpoint {Path(name).parent.name}: {error.what} ({error.where})")

    def fetch_file(self, unit: str, name: str) -> None:
        """Fetch one file of a stage if the storage has it and this disk has not.

        Of a stage that was set aside and not stored again, because of a kill: that of the last one set aside. It gets a
        folder of its own, since other results may have been set aside here.

        Raises:
            Damaged: it is damaged in the storage.
            UserError: the storage can't be read, or the disk is full.
        """
        if unit in self.store.records:
            if name in self._absent(unit):
                self._get(unit, [name])
        elif number := self._times_aside(unit):
            last = f"{unit}.old-{number}"
            kept = self.store.records[last].files.get(name)
            here = [path for path in self.root.glob(f"{unit}.old-*/{name}") if path.is_file()]
            if kept and kept.sha256 not in map(durable.sha256, here):
                _complete(self.store, last, [name], ledger.name_aside(self.root / unit))

    def keep_stage(self, unit: str, *, made: bool) -> None:
        """Store a complete stage; one that was not ``made`` just now only if the storage has a different one.

        Raises:
            UserError: it could not be stored.
        """
        folder = self.root / unit
        if unit in self.uploads:
            self.uploads.pop(unit).wait()
        record, done = self.store.records.get(unit), folder / ledger.DONE
        kept = record.files.get(ledger.DONE) if record else None
        if made or kept is None or kept.sha256 != durable.sha256(done):
            self._put(unit, contents.of_stage(folder, self.sent.get(unit)), last=True)
            _log.debug("stored: %s", unit)
        self.keep_run()

    def keep_run(self) -> None:
        """Store the files of the run itself, if they have changed.

        Raises:
            UserError: they could not be stored.
        """
        found = Contents()
        for name in RUN_FILES:
            found.add_text(name, self.root / name)
        record = self.store.records.get(RUN, Record({}))
        now = {name: (size, sha) for name, (size, sha, _) in found.sources.items()}
        if now != {name: (kept.size, kept.sha256) for name, kept in record.files.items()}:
            self._put(RUN, found.sources)

    def set_aside(self, unit: str) -> None:
        """Keep the record of a stage under another name: its files stay, and the stage starts over.

        Raises:
            UserError: it could not be written.
        """
        if unit in self.uploads:
            self.uploads.pop(unit).wait()
        record = self.store.records.get(unit)
        if record is None:
            return
        number = self._times_aside(unit) + 1
        self.store.replace({f"{unit}.old-{number}": record, unit: None})
        self.based.pop(unit, None)
        self._write_note()

    def _times_aside(self, unit: str) -> int:
        """How many records of a stage were set aside, which is the number of the last one."""
        number = 0
        while f"{unit}.old-{number + 1}" in self.store.records:
            number += 1
        return number

    def upload(self, unit: str) -> None:
        """Start to store the complete files of a training, in a thread."""
        if unit not in self.uploads:
            self.uploads[unit] = Uploads(lambda found: self._upload(unit, found))
        sent = dict(self.sent.get(unit, {}))
        folder = self.root / unit
        self.uploads[unit].start(contents.of_training(folder, self._stored(unit), sent))

    def objects(self) -> dict[tuple[int, str], str]:
        """URLs of what the storage keeps, or is about to, by bytes and SHA-256."""
        about_to = {
            one: f"{self.store.url}/{file_name(unit, name, one[1])}"
            for unit, files in list(self.sent.items())
            for name, one in list(files.items())
        }
        return about_to | self.store.objects()

    def _stored(self, unit: str) -> dict[str, tuple[int, str]]:
        record = self.store.records.get(unit, Record({}))
        return {name: (kept.size, kept.sha256) for name, kept in record.files.items()}

    def _upload(self, unit: str, found: Contents) -> None:
        self.keep_run()
        self._put(unit, found.sources)

    def _put(self, unit: str, sources: dict[str, Any], last: bool = False) -> None:
        self.store.put(unit, sources, self.scratch)
        self._note_held(unit)
        self._forget_pruned(unit, last)

    def _forget_pruned(self, unit: str, last: bool) -> None:
        """Remove from the store what other hosts have sent of checkpoints that are gone, if no record names it.

        ``last``: no upload of this unit is waiting, and none will follow.
        """
        sent = self.sent.get(unit, {})
        gone = {
            name: one
            for name, one in list(sent.items())
            if not (self.root / unit / name).parent.is_dir()
        }
        # An upload that waits may still name what has just gone; after that one it is in a record, or not needed.
        before = set(gone) if last else self._gone.get(unit, set())
        unneeded = {name: one for name, one in gone.items() if name in before}
        self._gone[unit] = set(gone)
        self.store.forget(unit, unneeded)
        for name in unneeded:
            sent.pop(name, None)

    def _absent(self, unit: str) -> list[str]:
        record = self.store.records.get(unit)
        if record is None or not self._same(unit, record):
            return []
        folder = self.root / unit
        entry = ledger.finished(folder)
        sizes = dict(entry.outputs) if entry else {}
        return [name for name in record.files if not _is_there(folder / name, sizes.get(name))]

    def _same(self, unit: str, record: Record) -> bool:
        """Whether the record matches the stage in the folder: both finished, or both begun, under the same key."""
        for name in RECORDED:
            path, kept = self.root / unit / name, record.files.get(name)
            if path.is_file() or kept is not None:
                here = durable.sha256(path) if path.is_file() else None
                return kept is not None and here == kept.sha256
        return True

    def _restore(self) -> list[Path]:
        """Restore config and records of stages; return folders moved aside because the run has continued elsewhere."""
        moved = []
        for unit in _with_notes(self.root):
            if unit not in self.store.records:  # removed, or set aside just before a kill
                (self.root / unit / ledger.HELD).unlink()
        for unit, record in sorted(self.store.records.items()):
            if ".old-" in unit:
                continue
            folder = self.root if unit == RUN else self.root / unit
            current = record.writer == self.scratch or self.based.get(unit) == record.digest
            if unit != RUN and not current and any((folder / n).is_file() for n in RECORDED):
                moved.append(ledger.set_aside(folder))
            if unit == RUN:
                names = [n for n in record.files if not (current and (folder / n).is_file())]
                self._get(unit, names)
            elif not any((folder / n).is_file() for n in RECORDED):
                if unit == MANIFESTS:
                    self._get(unit, [n for n in record.files if n not in RECORDED])
                # The record that decides the folder's state goes last: after a kill it counts as not begun.
                for name in RECORDED:
                    self._get(unit, [name] if name in record.files else [])
            self._note_held(unit)
        return moved

    def _get(self, unit: str, names: Collection[str]) -> None:
        _complete(self.store, unit, names, self.root if unit == RUN else self.root / unit)

    def _note_held(self, unit: str) -> None:
        """Record which files of a unit the storage has, for readers of the folder."""
        record = self.store.records[unit]
        if unit != RUN:
            (self.root / unit / ledger.HELD).unlink(missing_ok=True)
        if unit != RUN and self._same(unit, record):
            held = {name: kept.size for name, kept in sorted(record.files.items())}
            durable.write_text(self.root / unit / ledger.HELD, json.dumps(held))
        self.based[unit] = record.digest
        self._write_note()

    def _write_note(self) -> None:
        note = {"url": self.store.url, "scratch": self.scratch, "based": self.based}
        durable.write_text(self.root / ledger.NOTE, json.dumps(note, indent=1))


def held_back(root: Path, units: Collection[str]) -> str | None:
    """The storage without which a run's folder is incomplete; None if nothing is missing."""
    for unit in units:
        folder = root / unit
        entry = ledger.finished(folder)
        names = [name for name, _ in entry.outputs] if entry and ledger.held(folder) else []
        if not all((folder / name).is_file() for name in names):
            return str(host_copies.read_note(root).get("url"))
    return None


def fetch_parts(store: Store, root: Path, parts: Mapping[str, str]) -> None:
    """Fetch files of units for a reader: those whose names have a given prefix, and the units' records.

    Args:
        store: read, never written.
        root: folder to fetch into, as the run's.
        parts: the prefix of the files' names, by unit.

    Raises:
        Damaged: one of them is damaged in the storage.
        UserError: the storage can't be read, or the disk is full.
    """
    for unit, start in parts.items():
        names = [n for n in store.records[unit].files if n.startswith(start) or n in RECORDED]
        _complete(store, unit, names, root if unit == RUN else root / unit)


def _complete(store: Store, unit: str, names: Collection[str], folder: Path) -> None:
    for _, error in sorted(store.get(unit, names, folder).items()):
        raise error


def _link(root: Path, view: Path, depth: int = 2) -> None:
    """Link ``view`` to the contents of a run's folder; replacing a file in the view leaves the folder unchanged.

    So many levels of folders are the view's own: what a plan fetches is no deeper (``model/memory/forgotten.csv``).
    """
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if depth and path.is_dir():
            (view / path.name).mkdir()
            _link(path, view / path.name, depth - 1)
        elif path.suffix != ".tmp":  # of a kill: the next writer of that name would write into it
            (view / path.name).symlink_to(path)


def _with_notes(root: Path) -> list[str]:
    """The stages' folders in which it is recorded which of their files are in a storage."""
    units = (path.parent.name for path in root.glob(f"*/{ledger.HELD}"))
    return [unit for unit in units if ".old-" not in unit]


def _is_there(path: Path, size: int | None) -> bool:
    """Whether a file exists, with the right size if that is known."""
    return path.is_file() and size in (None, path.stat().st_size)


def _only_to_resume(name: str) -> bool:
    return name.startswith(("checkpoints/step-", "graph/v"))
