"""A run in an object store: immutable files named by their contents, and records that say which are valid.

    owner.json                                   the writer: the run that was started last
    records/teacher.json                         the files of a stage, with their sizes and SHA-256
    files/teacher/checkpoints/…/state.3f…e1.json  a file; its name has the first digits of its SHA-256
    exchange/RUN/3f…e1                           what one host leaves for another (``depot.py``), for moments

Files are written first and never replaced; then the record, in one request, which a store completes or
rejects as a unit. So a writer that is killed at any moment leaves the state of the previous record. Files
that no record names are then removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.storage import transfer, urls
from cnn2gnn_dist.data.storage.transfer import RemoteFiles, RetryPolicy
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import in_threads

FORMAT = 1
RECORDS, FILES, EXCHANGE, OWNER = "records", "files", "exchange", "owner.json"
BRIEF = RetryPolicy(2, 0.2, 1.0, 5.0, 10.0)
"""For the first access to a store: it answers within seconds, or the run does not begin."""


class Damaged(UserError):
    """A file that a record names is not in the store as it was written."""


class Kept(NamedTuple):
    """A file in the store: bytes, hex SHA-256, and when it was written there (seconds since 1970)."""

    size: int
    sha256: str
    when: float


@dataclass(frozen=True)
class Record:
    """The files of one unit (a stage, or the run itself) by their paths relative to its folder.

    ``writer`` identifies the scratch folder that they came from.
    """

    files: Mapping[str, Kept]
    writer: str = ""

    @property
    def digest(self) -> str:
        """Identifies the record."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:20]

    def text(self) -> str:
        """The record as JSON, with its own checksum."""
        body = {
            "format": FORMAT,
            "writer": self.writer,
            "files": {name: list(kept) for name, kept in sorted(self.files.items())},
        }
        return json.dumps({"sha256": _sum(body), "body": body}, indent=1)

    @classmethod
    def of(cls, text: bytes, where: str) -> Record:
        """Read a record.

        Raises:
            Damaged: it is damaged.
            UserError: it was written by a later version.
        """  # noqa: DOC501
        try:
            tree = json.loads(text)
            body = tree["body"]
            if tree["sha256"] != _sum(body):
                raise ValueError("its checksum does not match")
            if body["format"] > FORMAT:
                raise UserError(
                    f"this run was stored by a newer version (format {body['format']}; this one reads "
                    f"{FORMAT})",
                    where=where,
                    remedy="upgrade cnn2gnn-dist",
                )
            files = {
                str(n): Kept(int(a), str(b), float(c)) for n, (a, b, c) in body["files"].items()
            }
            if any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in files):
                raise ValueError("a path in it leads outside the folder")
            return cls(files, str(body["writer"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(
                f"a record of the run's storage is damaged: {error}",
                where=where,
                remedy="restore the object from the store's versions, or remove it: the stage is then run "
                "again",
            ) from None


def file_name(unit: str, name: str, sha256: str) -> str:
    """The path of a file below the store's URL: readable, and unique to its contents."""
    path = PurePosixPath(FILES, unit, name)
    return str(path.with_name(f"{path.stem}.{sha256[:16]}{path.suffix}"))


@dataclass
class Store:
    """A URL that holds one run. After ``claim`` this process is the only writer, and knows all records.

    Attributes:
        url: without a trailing slash.
        records: by unit.
    """

    url: str
    records: dict[str, Record] = field(default_factory=dict)
    _owner: str = ""
    _files: RemoteFiles = field(default_factory=urls.remote_files)

    @classmethod
    def open(cls, url: str, field: str = "run.storage") -> Store:
        """Open a store, and read the records in it.

        Args:
            url: of the store.
            field: where the URL was given, for errors.

        Raises:
            UserError: not a URL that can be written to, no bucket, no permission, no answer; it holds
                something other than a run.
            Damaged: a record is damaged.
        """
        if not urls.is_remote(url):
            raise UserError(
                "this is not the URL of a store",
                where=f"{field}={url}",
                remedy="s3://BUCKET/FOLDER, for example; a folder that all hosts share is run.dir itself",
            )
        store = cls(url.rstrip("/"))
        with transfer.explained(field):
            there = RemoteFiles(BRIEF).below(store.url)
        records = any(name.startswith(f"{RECORDS}/") for name in there)
        if (
            there
            and not records
            and any(n != OWNER and not n.startswith((f"{FILES}/", f"{EXCHANGE}/")) for n in there)
        ):
            raise UserError(
                "this storage holds something other than a run",
                where=f"run.storage={url}",
                remedy="name a new folder: run.storage=s3://BUCKET/NEW_FOLDER",
            )
        store._read_records(name for name in there if name.startswith(f"{RECORDS}/"))
        return store

    def claim(self) -> None:
        """Become the writer; the run that was the writer before stops at its next upload.

        Records are read once more, since that run may have written one after ``open``. Files that no
        record names, left by a run that was killed during an upload, are removed, and so is what hosts have
        left for each other.

        Raises:
            UserError: nothing can be written.
            Damaged: a record is damaged.
        """
        self._owner = f"{socket.gethostname()}, process {os.getpid()}, {time.time_ns()}"
        with transfer.explained("run.storage"):
            RemoteFiles(BRIEF).send(f"{self.url}/{OWNER}", json.dumps(self._owner).encode())
        self._read_records(self._below(RECORDS))
        named = self._named()
        self._remove(n for n in self._below(FILES) if n not in named)
        self._remove(self._below(EXCHANGE))

    @property
    def owner(self) -> str:
        """Identifies this writer, after ``claim``."""
        return self._owner

    def put(
        self, unit: str, sources: Mapping[str, tuple[int, str, bytes | Path | None]], writer: str
    ) -> None:
        """Write the files of a unit that are not there yet, then its record.

        Args:
            unit: a stage's folder, or the run's.
            sources: bytes, SHA-256 and contents (or their path) of every current file; None: another host
                has written it here. Files that only the unit's previous record names are removed.
            writer: the scratch folder that they come from.

        Raises:
            UserError: it could not be written, or another run writes here now.
        """
        before, now = self.records.get(unit, Record({})), time.time()
        files = {}
        for name, (size, sha, _) in sources.items():
            old = before.files.get(name)
            known = old is not None and old[:2] == (size, sha)
            files[name] = old if known and old is not None else Kept(size, sha, now)
        fresh = [name for name, kept in files.items() if before.files.get(name) != kept]

        def send(name: str) -> None:
            kept = files[name]
            url, source = f"{self.url}/{file_name(unit, name, kept.sha256)}", sources[name][2]
            if source is not None:
                self._files.send(url, source)
            elif self._files.file_info(url).bytes != kept.size:
                raise _damaged("is not as another host has written it", url)

        in_threads.each(send, fresh)
        self.replace({unit: Record(files, writer)})

    def replace(self, records: Mapping[str, Record | None]) -> None:
        """Write records, in this order, and remove those that are None; then files that none names.

        Raises:
            UserError: it could not be written, or another run writes here now.
        """
        self._check_owner()
        gone = self._named()
        for unit, record in records.items():
            url = f"{self.url}/{RECORDS}/{unit}.json"
            if record is None:
                self._files.remove(url)
                self.records.pop(unit, None)
            else:
                self._files.send(url, record.text().encode())
                self.records[unit] = record
        # A run that took over between that check and the record continues from the previous record.
        self._check_owner()
        self._remove(gone - self._named())

    def forget(self, unit: str, files: Mapping[str, tuple[int, str]]) -> None:
        """Remove files that no record names: bytes and SHA-256 by name.

        Raises:
            UserError: one can't be removed.
        """
        found = {file_name(unit, name, sha) for name, (_, sha) in files.items()}
        self._remove(found - self._named())

    def objects(self) -> dict[tuple[int, str], str]:
        """URLs of all files that records name, by bytes and SHA-256."""
        return {
            (kept.size, kept.sha256): (
                f"{self.url}/{file_name(unit.partition('.old-')[0], name, kept.sha256)}"
            )
            for unit, record in list(self.records.items())
            for name, kept in record.files.items()
        }

    def get(self, unit: str, names: Iterable[str], folder: Path) -> dict[str, Damaged]:
        """Fetch files of a unit into a folder, each complete or not at all; return what is wrong with the others.

        Raises:
            UserError: the store can't be read, or the disk is full.
        """
        record, damaged = self.records[unit], dict[str, Damaged]()

        def fetch(name: str) -> None:
            try:
                self._fetch(unit, name, record.files[name], folder / name)
            except Damaged as error:
                damaged[name] = error

        in_threads.each(fetch, sorted(names))
        return damaged

    def _fetch(self, unit: str, name: str, kept: Kept, target: Path) -> None:
        url = f"{self.url}/{file_name(unit.partition('.old-')[0], name, kept.sha256)}"
        try:
            size = self._files.file_info(url).bytes
        except UserError as error:
            if "does not exist" not in error.what:
                raise
            raise _damaged("is missing", url) from None
        if size != kept.size:
            raise _damaged(f"has {size:,} bytes instead of {kept.size:,}", url)
        found = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(target) as partial:
            with open(partial, "wb") as file:

                def write(data: bytes) -> None:
                    found.update(data)
                    file.write(data)

                self._files.fetch(url, 0, kept.size, write)
            if found.hexdigest() != kept.sha256:
                raise _damaged("does not have the contents that were written", url)
            os.utime(partial, (kept.when, kept.when))

    def _read_records(self, names: Iterable[str]) -> None:
        """Read all records, each as it was at one moment though another run may be writing."""
        self.records = {}
        for name in names:
            where = f"{self.url}/{name}"
            text, record = b"", None
            while record is None:
                before, text = text, self._read(where)
                try:
                    record = Record.of(text, where)
                except Damaged:
                    if (
                        text == before
                    ):  # otherwise it was replaced between the requests for length and bytes
                        raise
            self.records[PurePosixPath(name).stem] = record

    def _read(self, url: str) -> bytes:
        return self._files.read_range(url, 0, self._files.file_info(url).bytes)

    def _check_owner(self) -> None:
        text = self._read(f"{self.url}/{OWNER}").decode(errors="replace")
        if text != json.dumps(self._owner):
            who = text.strip('"').rpartition(",")[0]
            raise TakenOver(
                f"another run has been started with this storage: on {who}",
                where=f"run.storage={self.url}",
                remedy="stop one of the two, or give this one another storage",
            )

    def _named(self) -> set[str]:
        """All files that records name; those of a unit that was set aside stay where they were."""
        return {
            file_name(unit.partition(".old-")[0], name, kept.sha256)
            for unit, record in self.records.items()
            for name, kept in record.files.items()
        }

    def _below(self, folder: str) -> list[str]:
        return [f"{folder}/{name}" for name in self._files.below(f"{self.url}/{folder}")]

    def _remove(self, names: Iterable[str]) -> None:
        in_threads.each(lambda name: self._files.remove(f"{self.url}/{name}"), sorted(names))


class TakenOver(UserError):
    """Another run writes into this storage now."""


def _sum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damaged(how: str, url: str) -> Damaged:
    return Damaged(
        f"an object of the run's storage {how}",
        where=url,
        remedy="restore it from the store's versions, or remove the stage's record in records/: the stage is "
        "then run again",
    )
