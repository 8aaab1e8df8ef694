"""Records of key schema 1, from before records named a schema: their contents, and their validity.

Schema 1 hashed complete sections, including fields at their defaults, and recorded them as nested
mappings. Its keys are no longer created: a record is read, its key is compared with the hash of its
contents, and its fields are then compared with the config's like those of any other
(``keys.matches``). A stage resumes under the key with which it was started.

Nothing here changes: these are the fields that schema 1 had when it ended. Records from before
then, with fewer fields, were already stale and still are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnn2gnn_dist import ledger
from cnn2gnn_dist.ledger import Entry

_SECTIONS = {
    "views": "kind size pad scale ratio resize mean std",
    "teacher": "epochs global_batch lr warmup_epochs weight_decay clip label_smoothing arch args "
    "pretrained weights",
    "targets": "views top_k",
    "graph": "scope dim candidates neighbours fanouts second_hop sampler query parts partitioner "
    "start_epoch warmup_epochs refresh_epochs exact recall warm_start probes repartition_cut move_gain",
    "student": "epochs global_batch lr warmup_epochs weight_decay clip label_smoothing stem "
    "stem_args dim hidden label_dim distill_weight temperature self_loss neighbour_loss",
    "evaluate": "gallery",
}
_OPTIONAL = {"teacher.ds_config", "student.ds_config", "evaluate.batch"}
_STAGES = {
    "pack": "seed data.source data.shard_size data.limit data.image_column data.label_column",
    "index": "seed data.holdout data.num_classes data.match_classes data.allow_empty_classes",
    "teacher": "seed views stream.window teacher",
    "targets": "seed views targets",
    "student": "seed views stream.window targets.views student graph",
    "graph": "graph",
    "control": "seed views stream.window targets.views student",
    "evaluate": "evaluate",
}


def by_dotted_names(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record by dotted names, with sections flattened."""
    found: dict[str, Any] = {}
    for name, value in parts.items():
        if "." not in name and isinstance(value, dict):
            found |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            found[name] = value
    return found


def is_authentic(entry: Entry, stage: str, inputs: Mapping[str, str]) -> bool:
    """Whether a record's key is what schema 1 derives from the record's own fields and these inputs."""
    names = by_dotted_names(entry.parts).keys() - _OPTIONAL
    same = stage in _STAGES and names == _fields(stage)
    return same and entry.key == ledger.key_of(stage, entry.parts, inputs, schema=1)


def _fields(stage: str) -> set[str]:
    found: set[str] = set()
    for name in _STAGES[stage].split():
        inner = _SECTIONS.get(name, "").split()
        found |= {f"{name}.{one}" for one in inner} or {name}
    return found
