"""Edits of a memory, each of which makes a new version: add, remove, relabel, forget, undo, compact."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data.index.class_matching import plain
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.memory import decisions, rewiring, store, turns
from cnn2gnn_dist.inference.memory.forgetting import record_forgotten
from cnn2gnn_dist.inference.memory.rewiring import Rewired
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.store import ClassEntry, NewRows, Version
from cnn2gnn_dist.inference.memory.view import LIKELY, Memory, forgotten
from cnn2gnn_dist.log import counted

NAMED = 5
"""Most keys named in an error."""
LONGEST_NAME = 200
"""Most letters of the name of a new class."""
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, half characters and line ends."""


def create(
    root: Path, rows: NewRows, classes: Sequence[str], action: str, left_out: np.ndarray
) -> None:
    """Create a memory from rows and their candidate table.

    Args:
        root: folder; it must not exist, or hold only the list of forgotten images, which stays.
        rows: all rows, with candidates.
        classes: names of the trained classes.
        action: what was done, for people.
        left_out: int64, rows that are never candidates (corrupt images).
    """
    root.mkdir(parents=True, exist_ok=(root / store.FORGOTTEN).is_file())
    with turns.editing(root):
        name = store.write_segment(root, rows)
        arrays = {"removed": np.asarray(left_out, np.int64)} if len(left_out) else {}
        entries = tuple(ClassEntry(name, True) for name in classes)
        store.write_version(
            root,
            Version(0, None, store.now(), action, ((name, len(rows.labels)),), entries),
            arrays,
        )


class Edit:
    """Changes to the current version, written as one new version by ``commit``.

    Use within ``turns.editing``. Nothing is changed before ``commit``.

    Attributes:
        live, labels, classes, trained: after the edit; see ``Memory`` and ``Version``.
        heads: how new classes are scored.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.before = root, Memory.open(root)
        self.live = self.before.live.copy()
        self.labels = self.before.labels.copy()
        self.classes = list(self.before.version.classes)
        self.heads: Mapping[str, Any] = self.before.version.heads
        self.trained = self.before.trained
        self._added: NewRows | None = None
        self._rewired: tuple[np.ndarray, Rewired] | None = None

    def x(self, ids: np.ndarray) -> np.ndarray:
        """Features of rows, including those just added."""
        return self._with_added(ids, self.before.x, None if self._added is None else self._added.x)

    def z(self, ids: np.ndarray) -> np.ndarray:
        """Projections of rows, including those just added."""
        return self._with_added(ids, self.before.z, None if self._added is None else self._added.z)

    def candidates(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n, M]: the candidates of live rows after the edit; -1 = none."""
        return rewiring.candidates(self.before.base_table, self.rewired(self.live), ids)

    def nearest_others(self, ids: np.ndarray, count: int) -> np.ndarray:
        """int32 [n, count]: the live rows after the edit that are nearest to live rows; -1 where there are fewer."""
        return rewiring.nearest_rows(self.all_z(), np.flatnonzero(self.live), ids, count)

    def all_z(self) -> np.ndarray:
        """Projections of all rows, including those just added."""
        z_Nd = self.before.all_z()
        return z_Nd if self._added is None else np.concatenate([z_Nd, self._added.z])

    def rewired(self, live_N: np.ndarray) -> Rewired:
        """Rows whose candidates differ from the base table if these rows are live; the last ones are kept."""
        if self._rewired is None or not np.array_equal(self._rewired[0], live_N):
            found = rewiring.rewired(self.before.base_table, self.all_z(), live_N)
            self._rewired = live_N.copy(), found
        return self._rewired[1]

    def class_index(self, name: str, *, new: bool) -> int:
        """Index of a class; ``new``: it is added if it is missing.

        Surrounding spaces and the encoding of accents don't make a different class.

        Raises:
            UserError: unknown class; two classes of this name; a new name that is empty, too long or can't
                be printed.
        """
        names = [entry.name for entry in self.classes]
        if name not in names:
            name = plain(name)
            names = [plain(one) for one in names]
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} classes of the memory have the name '{name}'",
                where=str(self.root),
                remedy="train with different names for them: the name does not tell which one is meant",
            )
        if name in names:
            return names.index(name)
        if not new:
            raise UserError(
                f"the memory has no class '{name}'",
                where=str(self.root),
                remedy="`cnn2gnn memory ls MODEL` lists them; `cnn2gnn memory add MODEL IMAGES --class NAME` adds one",
            )
        if not name:
            raise UserError("a class needs a name", where="--class", remedy="--class NAME")
        if len(name) > LONGEST_NAME or any(unicodedata.category(c) in UNPRINTABLE for c in name):
            raise UserError(
                f"{name[:40]!a} is too long for the name of a class, or can't be printed",
                where="--class",
                remedy=f"at most {LONGEST_NAME} printable characters",
            )
        self.classes.append(ClassEntry(name, False))
        return len(self.classes) - 1

    def rows_of(self, keys: Sequence[str]) -> np.ndarray:
        """Live rows of keys, int64.

        Raises:
            UserError: a key is unknown.
        """
        found = self.before.ids_of(list(keys))
        missing = [key for key in keys if key not in found]
        if missing:
            some = ", ".join(missing[:NAMED]) + (", …" if len(missing) > NAMED else "")
            are = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"{len(missing)} of {counted(len(keys), 'key')} {are} not in the memory: {some}",
                where=str(self.root),
                remedy="`cnn2gnn memory ls MODEL --keys` lists them; nothing was changed",
            )
        return np.array([found[key] for key in dict.fromkeys(keys)], np.int64)

    def add(self, rows: NewRows) -> None:
        """Add rows; their labels index into ``classes``.

        Raises:
            UserError: a key, or an image, is already in the memory.
        """
        self._refuse_known(rows)
        self._added = rows
        self.live = np.concatenate([self.live, np.ones(len(rows.labels), bool)])
        self.labels = np.concatenate([self.labels, rows.labels.astype(np.int32)])

    def remove(self, rows: np.ndarray) -> None:
        """Remove live rows."""
        self.live[rows] = False

    def relabel(self, rows: np.ndarray, label: int) -> None:
        """Give rows another class."""
        self.labels[rows] = label

    def commit(self, action: str, *, undoable: bool = True) -> Version:
        """Write the new version and make it current; ``undoable``: it can be undone.

        Raises:
            UserError: the disk is full; the previous version stays current.
        """
        before = self.before.version
        segments = list(before.segments)
        if self._added is not None:
            segments.append((store.write_segment(self.root, self._added), len(self._added.labels)))
        arrays = _of_added(self.before.added[: before.segments[0][1]])
        stored = np.concatenate(
            [np.load(store.segment_folder(self.root, name) / "labels.npy") for name, _ in segments]
        )
        other = np.flatnonzero(stored != self.labels)
        if len(other):
            arrays["relabelled"] = np.stack([other, self.labels[other].astype(np.int64)], 1)
        if not self.live.all():
            arrays["removed"] = np.flatnonzero(~self.live)
        changed = self.rewired(self.live)
        if len(changed.ids_K):
            arrays["changed"], arrays["changed_rows"] = changed
        version = Version(
            number=store.numbers(self.root)[-1] + 1,
            parent=before.number if undoable else None,
            made=store.now(),
            action=action,
            segments=tuple(segments),
            classes=tuple(self.classes),
            heads=self.heads,
            dropped=before.dropped,
        )
        store.write_version(self.root, version, arrays)
        return store.read_version(self.root, version.number)

    def _with_added(
        self,
        ids: np.ndarray,
        stored: Callable[[np.ndarray], np.ndarray],
        added: np.ndarray | None,
    ) -> np.ndarray:
        first = self.before.rows
        if added is None:
            return stored(ids)
        new = ids >= first
        found = np.empty((len(ids), added.shape[1]), added.dtype)
        found[~new], found[new] = stored(ids[~new]), added[ids[new] - first]
        return found

    def _refuse_known(self, rows: NewRows) -> None:
        known = self.before.ids_of(list(rows.keys))
        if known:
            raise UserError(
                f"{len(known)} of these keys are already in the memory: {', '.join(list(known)[:NAMED])}",
                where=str(self.root),
                remedy="leave them out, rename the files, or remove the old ones first; nothing was changed",
            )
        if len(set(rows.keys)) < len(rows.keys):
            raise UserError(
                "two of these images have the same name",
                remedy="name each image once, or rename one; nothing was changed",
            )
        x_nD = np.ascontiguousarray(rows.x, np.float16)
        first: dict[bytes, str] = {}
        for key, x in zip(rows.keys, x_nD, strict=True):
            if (other := first.setdefault(x.tobytes(), key)) != key:
                raise UserError(
                    f"{other} and {key} are the same image",
                    remedy="leave one of them out; nothing was changed",
                )
        near_nF = self.before.nearest(rows.z.astype(np.float32), LIKELY)
        same_n = self.before.same(rows.x, near_nF)
        known_n = np.flatnonzero(same_n >= 0)
        if len(known_n):
            there = same_n[known_n[:1]]
            name = self.before.classes[int(self.before.labels[there[0]])]
            raise UserError(
                f"the image {rows.keys[known_n[0]]} is already in the memory, as {self.before.keys(there)[0]} of the "
                f"class '{name}'",
                where=str(self.root),
                remedy="leave it out, or `cnn2gnn memory relabel` it; nothing was changed",
            )


def _no_check() -> None:
    """The memory is the one that is meant."""


def undo(root: Path, check: Callable[[], object] = _no_check) -> Version:
    """Return to the version before the current one; ``check`` as in ``forget``.

    Raises:
        UserError: there is none: it is the first, or the memory was compacted.
    """
    with turns.editing(root):
        check()
        current = store.read_version(root, store.head(root))
        if current.parent is None or current.parent not in store.numbers(root):
            raise UserError(
                "there is no earlier version: nothing to undo",
                where=str(root),
                remedy="`cnn2gnn memory log MODEL` lists the versions; compacting and forgetting drop the earlier ones",
            )
        before = store.read_version(root, current.parent)  # raises before anything is changed
        store.set_head(root, current.parent)
        return before


def history(root: Path) -> list[Version]:
    """The current version and its ancestors, newest first."""
    found = [store.read_version(root, store.head(root))]
    there = set(store.numbers(root))
    while found[-1].parent is not None and found[-1].parent in there:
        found.append(store.read_version(root, found[-1].parent))
    return found


def compact(root: Path, check: Callable[[], object] = _no_check) -> Version:
    """Write the live rows as one segment, delete everything else; no answer changes. ``check`` as in ``forget``."""
    with turns.editing(root):
        check()
        return _compact(root, Memory.open(root), "compact")


def forget(
    root: Path,
    keys: Sequence[str],
    *,
    score: Callable[[Edit], object] = lambda _: None,
    apart: SetApart | None = None,
    elsewhere: Callable[[], object] = _no_check,
    wait_s: float = 10.0,
    check: Callable[[], object] = _no_check,
) -> Version:
    """Remove rows and delete everything stored about them, in earlier versions too.

    Their keys go to ``forgotten.csv``, so that later trainings leave them out. The weights of the
    network, which were trained on the images, stay as they are.

    Args:
        root: of the memory.
        keys: of images of the current version, removed ones that are still in an earlier version, or those
            set apart.
        score: sets how new classes are scored without these rows.
        apart: the images that the model was calibrated on.
        elsewhere: deletes what else shows the images; called once they are recorded as forgotten.
        wait_s: seconds to wait for another edit to finish.
        check: raises an exception if this is not the memory that is meant; called when no other edit is possible.

    Raises:
        UserError: a key is unknown; nothing was changed.
    """
    with turns.editing(root, wait_s):
        check()
        edit = Edit(root)
        there = list(edit.before.ids_of(list(keys)))
        if len(there) < len(set(keys)):
            # Removed ones are purged from disk, as are those that a killed attempt had started with.
            removed = store.keys_on_disk(root).union(forgotten(root)) - set(there)
            known = removed if apart is None else removed | apart.keys()
            _refuse_unknown(edit, [key for key in keys if key not in known], apart)
        action = f"forget {counted(len(set(keys)), 'image')}"
        edit.remove(edit.rows_of(there))
        if there or (apart is not None and not apart.keys().isdisjoint(keys)):
            score(edit)
        # Recorded first: after a kill they may or may not be removed, but never without a record.
        record_forgotten(root, keys)
        if apart is not None:
            apart.forget(keys)
        elsewhere()
        decisions.forget(root, keys)
        edit.commit(action, undoable=False)
        return _compact(root, Memory.open(root), action)


def _refuse_unknown(edit: Edit, keys: Sequence[str], apart: SetApart | None) -> None:
    try:
        edit.rows_of(keys)
    except UserError as error:
        if apart is None or not apart.unnamed:
            raise
        raise UserError(
            f"{error.what}; an image may be one of the {apart.unnamed} set apart for calibration, whose keys this "
            "model, exported before 28 Nov 2026, does not have",
            where=error.where,
            remedy="`cnn2gnn memory ls MODEL --keys` lists those in the memory; to forget one set apart, make "
            "RUN/model anew with `cnn2gnn run --update` and the run's config, and forget it there; nothing was changed",
        ) from None


def _compact(root: Path, memory: Memory, action: str) -> Version:
    ids = memory.live_ids
    new_N = np.full(memory.rows, -1, np.int32)
    new_N[ids] = np.arange(len(ids), dtype=np.int32)
    table = memory.candidates(ids)
    rows = NewRows(
        x=memory.x(ids),
        z=memory.z(ids),
        labels=memory.labels[ids],
        candidates=np.where(table >= 0, new_N[table.clip(min=0)], -1).astype(np.int32),
        keys=memory.keys(ids),
        sources=memory.sources(ids),
        thumbnails=memory.thumbnails(ids),
    )
    version = replace(
        memory.version,
        number=store.numbers(root)[-1] + 1,
        parent=None,
        made=store.now(),
        action=action,
        segments=((store.write_segment(root, rows), len(ids)),),
        files={},
        dropped=store.marks(root, memory.version),
    )
    store.write_version(root, version, _of_added(memory.added[ids]))
    turns.drop_all_but(root, version)
    return store.read_version(root, version.number)


def _of_added(added_N: np.ndarray) -> dict[str, np.ndarray]:
    """What a version records of the rows of its first segment that were added, not there when it was created."""
    return {"added": np.flatnonzero(added_N)} if added_N.any() else {}
