"""Commands on a run.storage URL instead of a folder: what they read is fetched to a temporary folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError

if TYPE_CHECKING:  # needs training's packages, which a machine that only answers may not have
    from cnn2gnn_dist.run_storage.store import Store

TRAININGS = ("teacher", "student", "control")


@contextmanager
def model_at(place: str) -> Iterator[Path]:
    """Context manager for the folder of a model or run; a stored run's model is fetched.

    Raises:
        UserError: no run is stored there, it has no model yet, or something in it is damaged.
    """
    if not is_remote(place):
        yield Path(place)
        return
    from cnn2gnn_dist.run_storage import session

    store = _opened(place, place)
    if "model" not in store.records:
        raise UserError(
            "the run stored here has no model yet",
            where=place,
            remedy=f"finish it: `cnn2gnn run` with its config and run.storage={place}",
        )
    with tempfile.TemporaryDirectory(prefix="cnn2gnn-stored-") as name:
        session.fetch_parts(store, Path(name), {"model": ""})
        yield Path(name) / "model"


@contextmanager
def checkpoints_at(place: str) -> Iterator[Path]:
    """Context manager for a folder with checkpoints: of a run, of a stage in it, or one checkpoint.

    Of a stored run (URL, URL/STAGE, URL/STAGE/checkpoints/step-…) they are fetched completely, with the
    manifests and the records of their stages.

    Raises:
        UserError: no run is stored there, or something in it is damaged.
    """
    if not is_remote(place):
        yield Path(place)
        return
    from cnn2gnn_dist.run_storage import session

    store, below = _run_of(place)
    stages = [below.partition("/")[0]] if below else [s for s in TRAININGS if s in store.records]
    wanted = {stage: "checkpoints/" for stage in stages if stage in store.records}
    with tempfile.TemporaryDirectory(prefix="cnn2gnn-stored-") as name:
        folder = Path(name)
        others = {unit: "" for unit in (session.RUN, session.MANIFESTS) if unit in store.records}
        session.fetch_parts(store, folder, wanted | others)
        yield folder / below


def _run_of(place: str) -> tuple[Store, str]:
    """The run that a URL names, or in which it names a stage or a checkpoint: its path in the run, or ""."""
    from cnn2gnn_dist.run_storage.store import Store

    found = re.fullmatch(
        rf"(.+?)/({'|'.join(TRAININGS)})(/checkpoints/step-\d+)?", place.rstrip("/")
    )
    if found is None:
        return _opened(place, place), ""
    if found[3] is None:  # the URL of a run may end with the name of a stage, too
        store = Store.open(place, field="")
        if store.records:
            return store, ""
    return _opened(found[1], place), f"{found[2]}{found[3] or ''}"


def _opened(url: str, place: str) -> Store:
    from cnn2gnn_dist.run_storage.store import Store

    store = Store.open(url, field="")
    if not store.records:
        raise UserError(
            "no run is stored here",
            where=place,
            remedy="name the URL that the run's config has as run.storage",
        )
    return store
