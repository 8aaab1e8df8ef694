"""Inputs of a stage's key: config fields, files outside the run, and the stages it builds on."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from cnn2gnn_dist import durable, field_names, ledger, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.index import fingerprint
from cnn2gnn_dist.data.index.fingerprint import Fingerprint
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.pipeline import key_relevance, keys_v1
from cnn2gnn_dist.pipeline.key_defaults import DEFAULTS
from cnn2gnn_dist.pipeline.registry import EXECUTION, STAGES, VERSIONS, Stage
from cnn2gnn_dist.stages.shared.context import RunPaths, load_manifest
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder

_log = logging.getLogger(__name__)

NOTE = "inputs.json"
"""File in the run's folder that lists the files the run was made from."""
ROLES = ("train", "test")
_OF_FILES = ("imagefolder", "parquet", "shards")
"""Sources of files that may change; torchvision verifies its downloads against its own checksums."""
_NO_FILES = {"files": ledger.digest_of("files", {"files": []})}

DeepSpeed = dict[str, dict[str, Any]]
"""The DeepSpeed configs as read, of "teacher" and "student"."""


def read_deepspeed(config: Config) -> DeepSpeed:
    """Read the DeepSpeed configs, once for all ranks: their working directories may differ.

    Raises:
        UserError: one is missing or invalid.
    """
    return {
        "teacher": ds_config.load(config.teacher.ds_config),
        "student": ds_config.load(config.student.ds_config),
    }


def parts(
    config: Config,
    stage: Stage,
    deepspeed: DeepSpeed,
    entry: Entry | None = None,
    recorded: Entry | None = None,
    *,
    anew: bool = False,
) -> dict[str, Any]:
    """The fields behind a stage's key by their dotted names, including those at their defaults.

    Files that a field names count by their content, a DeepSpeed config (``teacher.ds_config``) by
    its effect on results.

    Args:
        config: of the run.
        stage: the stage.
        deepspeed: the DeepSpeed configs.
        entry: the stage's record; used for files that no longer exist.
        recorded: the record of a stage that was begun; None: ``entry``. A field that did not count when it
            was written leaves its key as it is.
        anew: of a result that takes the place of the recorded one, so that all fields count.
    """
    values = settings.as_flat(config) | VERSIONS
    pools = key_relevance.POOLS if config.graph.scope == "batch" else {}
    left_out = EXECUTION - pools.get(stage.name, frozenset())
    found = {name: values[name] for name in _of_stage(stage, values) if name not in left_out}
    for model, read in deepspeed.items():
        others = ds_config.outcome(read) if model in stage.fields else {}
        if others:  # the packaged file's contents are not in the key
            found[f"{model}.ds_config"] = others
    begun = None if anew else recorded or entry
    key_relevance.drop_idle(found, stage, config, parts_of(begun) if begun else None)
    for name, remedy in _CONTENTS.items():
        if found.get(name):
            before = parts_of(entry).get(name) if entry else None
            found[name] = _content_of(name, Path(found[name]), before, remedy)
    if stem := found.get("student.stem_args", {}).get("weights"):
        known = parts_of(entry) if entry else {_STEM: None}
        if anew or _STEM in known:  # records from before it counted stay valid
            remedy = _CONTENTS["student.weights"]
            found[_STEM] = _content_of(_STEM, Path(str(stem)), known.get(_STEM), remedy)
    if found.get("data.relabel"):
        before = parts_of(entry).get("data.relabel") if entry else None
        found["data.relabel"] = _relabel_list(Path(found["data.relabel"]), before)
    return found


def _of_stage(stage: Stage, names: Iterable[str]) -> list[str]:
    """The fields that a stage names, directly or by their section."""
    return [name for name in names if any(f"{name}.".startswith(f"{f}.") for f in stage.fields)]


def key_of(stage: Stage, parts: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hex key of a stage.

    Fields at their frozen defaults (``key_defaults.py``) count as absent, so that a run stays complete
    when fields are added later; fields that have moved appear under their original names.
    """
    named = {field_names.original_name(name): value for name, value in parts.items()}
    non_default = {
        name: value
        for name, value in named.items()
        if name not in DEFAULTS or value != DEFAULTS[name]
    }
    return ledger.key_of(stage.name, non_default, inputs)


def parts_of(entry: Entry) -> dict[str, Any]:
    """The fields in a record by their current names, whatever its schema."""
    found = keys_v1.by_dotted_names(entry.parts) if entry.schema == 1 else entry.parts
    return {field_names.current_name(name): value for name, value in found.items()}


def matches(
    entry: Entry, stage: Stage, parts: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    """Whether a record of an older schema matches these fields and inputs.

    It is trusted only if its key is what that schema derives from the record's fields and these inputs.
    """
    authentic = entry.schema == 1 and keys_v1.is_authentic(entry, stage.name, inputs)
    return authentic and key_of(stage, parts_of(entry), inputs) == key_of(stage, parts, inputs)


def changes(entry: Entry, parts: Mapping[str, Any]) -> list[str]:
    """Describe the fields that differ from the recorded ones; an absent field is at its default."""
    before = parts_of(entry)
    defaults = {field_names.current_name(name): value for name, value in DEFAULTS.items()}
    filled = {name: defaults[name] for name in (before.keys() | parts.keys()) & defaults.keys()}
    return settings.differences({**filled, **before}, {**filled, **parts})


_CONTENTS = {
    "teacher.weights": "name a file: .safetensors, or .pth with a state dict",
    "student.weights": "name a file: .safetensors, or .pth with a state dict",
    "targets.logits": "name one Parquet file",
}
"""Fields that name a file that counts by its content, and what to do if it isn't a file."""
_STEM = "student.stem_args.weights"
"""The same inside a field; added to the parts, next to the field itself."""


def _content_of(field: str, path: Path, before: str | None, remedy: str) -> str:
    """A file by its name and content; a missing file by the recorded value."""
    try:
        stat = path.stat()
    except OSError:
        known = before is not None and before.startswith(f"{path.name} ")
        return str(before) if known else f"{path.name} is missing"
    if not S_ISREG(stat.st_mode):
        raise UserError(
            "this is not a weights file" if field.endswith("weights") else "this is not a file",
            where=f"{field}={path}",
            remedy=remedy,
        )
    return f"{path.name} {_sha256(path, stat.st_size, stat.st_mtime_ns)}"


def _relabel_list(path: Path, before: str | None) -> str:
    """A relabel list by its content, wherever it is; a missing file by the recorded value."""
    try:
        stat = path.stat()
    except OSError:
        return before or f"{path.name} is missing"
    return _sha256(path, stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else path.name


@functools.lru_cache
def _sha256(path: Path, size: int, time: int) -> str:
    return durable.sha256(path)[:20]


@dataclass
class Survey:
    """One command's view of the run's inputs and checkpoints: each is examined only once.

    Attributes:
        config: of the run.
        deepspeed: the DeepSpeed configs.
        reads: whether files not yet recorded may be read; a plan only compares.
        recheck: read contents even if lengths and modification times match the record.
    """

    config: Config
    deepspeed: DeepSpeed = field(default_factory=dict)
    reads: bool = False
    recheck: bool = False
    _found: dict[str, Fingerprint | None] = field(default_factory=dict)
    _damage: dict[Path, str | None] = field(default_factory=dict)

    def inputs(self, stage: Stage) -> dict[str, str]:
        """Checksums of the files outside the run that a stage reads, by the field that names them.

        Raises:
            UserError: they are missing.
        """
        data = self.config.data
        first = "index" if data.source == "shards" else "pack"
        if stage.name != first:
            return {}
        if data.source not in _OF_FILES:
            return dict(_NO_FILES)
        return {f"data.{role}": self.content(role) for role in self.roles}

    def content(self, role: str) -> str:
        """Checksum of the files of ``data.train`` or ``data.test``."""
        found = self._of(role)
        return found.content if found else "not read yet"

    def difference(self, role: str) -> str:
        """Describe which files differ from the record."""
        old, new = self.noted(role), self._of(role)
        return fingerprint.difference(old, new) if old and new else ""

    def untagged(self) -> bool:
        """Whether files are in a store without tags that distinguish their versions."""
        found = [noted for noted in map(self._of, self.roles) if noted is not None]
        return any(
            any(map(is_remote, noted.origin))
            and any(not mark for _, _, mark in (noted.files or {}).values())
            for noted in found
        )

    def keep(self) -> None:
        """Record in the run's folder the files that its results are made from."""
        found = {role: noted.tree() for role, noted in self._found.items() if noted}
        if found and found != self._notes:
            path = Path(str(self.config.run.dir)) / NOTE
            durable.write_text(path, json.dumps({**self._notes, **found}))
            self.__dict__.pop("_notes", None)

    def damage(self, checkpoint: Path, elsewhere: Collection[str] = ()) -> str | None:
        """Read a checkpoint completely; return what is wrong with it. Files ``elsewhere`` may be missing here."""
        if checkpoint not in self._damage:
            self._damage[checkpoint] = checkpoint_folder.damage(checkpoint, elsewhere)
        return self._damage[checkpoint]

    def noted(self, role: str) -> Fingerprint | None:
        """The record in the run's folder."""
        try:
            return Fingerprint.of(self._notes[role])
        except (KeyError, TypeError, ValueError):
            return None

    @functools.cached_property
    def _notes(self) -> dict[str, Any]:
        try:
            path = Path(str(self.config.run.dir)) / NOTE
            notes = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    @property
    def roles(self) -> list[str]:
        """Those of ``data.train`` and ``data.test`` that name files."""
        data = self.config.data
        named = [role for role in ROLES if self._origin(role) is not None]
        return named if data.source in _OF_FILES else []

    def _origin(self, role: str) -> str | list[str] | None:
        return self.config.data.train if role == "train" else self.config.data.test

    def _of(self, role: str) -> Fingerprint | None:
        if role not in self._found:
            self._found[role] = self._examine(role)
        return self._found[role]

    def _examine(self, role: str) -> Fingerprint | None:
        data, origin, before = self.config.data, self._origin(role), self.noted(role)
        assert origin is not None
        try:
            if data.source == "imagefolder":
                self._check_folder(role, origin, before)
            seen = fingerprint.list_files(
                origin, data.source, ask=self.reads or before is not None, brief=before is not None
            )
        except UserError as error:
            if before is None or not self._can_do_without(origin, before):
                raise
            _log.warning(f"{error.what} ({error.where}); assumed unchanged")
            return before
        if before is None and not self.reads:
            return None
        return fingerprint.fingerprint(
            origin, seen, before, read_all=data.checksums, recheck=self.recheck
        )

    def _check_folder(self, role: str, origin: str | list[str], before: Fingerprint | None) -> None:
        folder = Path(fingerprint.folder_of(origin))
        if before is not None and not folder.is_dir():  # for a new run the packer reports it
            raise UserError(
                "there is no such folder",
                where=str(folder),
                remedy=f"name the images' current folder: data.{role}=FOLDER",
            )
        if before is not None and not any(path.is_dir() for path in folder.iterdir()):
            raise UserError(
                "this folder had class folders, but has none now",
                where=str(folder),
                remedy=f"mount what was there, or name the images' current folder: data.{role}=FOLDER",
            )

    def _can_do_without(self, origin: str | list[str], before: Fingerprint) -> bool:
        """Whether a run can do without unreachable files: packed ones, and remote shards."""
        paths = fingerprint.paths_of(origin)
        packed = self.config.data.source != "shards"
        return paths == before.origin and (packed or all(map(is_remote, paths)))


def digest(survey: Survey, stage: Stage, key: str, files: list[Path]) -> str:
    """The digest that later stages build on.

    Rows of the manifests and contents of the input files; the weights of a training, which differ when
    it is repeated with other micro-batches or on other ranks; otherwise the key.
    """
    if stage.trains:
        return ledger.digest_of(stage.name, {"key": key, "weights": _weights_in(files)})
    if stage.name != "index":
        return key
    paths = RunPaths(Path(str(survey.config.run.dir)))
    manifests = [load_manifest(p) for p in (paths.train_manifest, paths.test_manifest)]
    found: dict[str, Any] = {"digests": [manifest.digest for manifest in manifests]}
    if survey.roles:
        found["files"] = {role: survey.content(role) for role in survey.roles}
        if any(is_remote(shard.path) for manifest in manifests for shard in manifest.shards):
            # A store without tags: the data read from it is identified by its checksums.
            found["crc"] = [_of_checksums(manifest.crc_N) for manifest in manifests]
    return ledger.digest_of("index", found)


def _weights_in(files: list[Path]) -> dict[str, str]:
    """Checksums of the tensors in the final checkpoint of a training."""
    found: dict[str, str] = {}
    for path in files:
        if path.name == checkpoint_folder.MANIFEST:
            listed = json.loads(path.read_text(encoding="utf-8"))["files"]
            found |= {
                name: sha for name, (_, sha) in listed.items() if name.endswith(".safetensors")
            }
    return found


def as_made(config: Config, root: Path, stage: str) -> Config:
    """The config with the fields that a finished stage was made with, whatever the run's config says now.

    A field introduced since then is at its default.

    Raises:
        UserError: a field that this version does not know.
    """
    entry, tree = ledger.finished(root / stage), settings.as_tree(config)
    names = _of_stage(STAGES[stage], DEFAULTS.keys() - EXECUTION)
    made = {field_names.current_name(name): DEFAULTS[name] for name in names}
    for name, value in ({**made, **parts_of(entry)} if entry else {}).items():
        section, _, one = name.rpartition(".")
        if section == "version" or one in ("ds_config", "weights", "logits", "relabel"):
            continue  # not a field: the content of a file, whose path the config has
        node = tree
        for inner in section.split(".") if section else ():
            node = node.setdefault(inner, {})
        node[one] = value
    return settings.check(tree)


def _of_checksums(crc_N: np.ndarray | None) -> str:
    return "" if crc_N is None else ledger.digest_of("crc", {"crc": crc_N.tobytes().hex()})
