"""The value at which a field counts as absent in keys: the default it was introduced with.

Frozen: a change here makes complete finished runs stale, or stale runs complete. When

- a field is added: it gets a line here, with the value that reproduces the behavior from before the
  field existed. If no value does, no line: the field is in every key, and finished runs are stale.
- a field moves: its line keeps the name that it was introduced with, and so do keys (``Section.moved``).
- the default of a field changes: its line stays. Runs that have the old value, by default or set, are
  complete under a config that sets it, and stale under the new default; both are right.
- a field is removed: its line stays as long as there are runs whose records have it.
- code changes a stage's result for the same fields: raise its version (``registry.VERSIONS``), or
  introduce a new one at 2, with a line here that says 1.
- none of this suffices: raise ``ledger.SCHEMA``, and keep a reader of the old records, such as
  ``keys_v1.py``.

``tests/unit/pipeline/test_key_schema.py`` fails where the config and this table disagree.
"""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "precision": "auto",
    "data.source": "digits",
    "data.holdout": 0.2,
    "data.shard_size": 2048,
    "data.image_column": "image",
    "data.label_column": "label",
    "data.limit": None,
    "data.calibration": 0.0,
    "data.relabel": None,
    "model.thumbnails": None,
    "data.num_classes": None,
    "data.match_classes": "name",
    "data.allow_empty_classes": False,
    "data.checksums": False,
    "views.kind": "crop_flip",
    "views.size": 32,
    "views.pad": 4,
    "views.scale": [0.35, 1.0],
    "views.ratio": [0.75, 1.3333333333333333],
    "views.resize": 1.0,
    "views.mean": [0.485, 0.456, 0.406],
    "views.std": [0.229, 0.224, 0.225],
    "stream.window": 16,
    "teacher.epochs": 10,
    "teacher.global_batch": 256,
    "teacher.lr": 0.001,
    "teacher.warmup_epochs": 1.0,
    "teacher.weight_decay": 0.05,
    "teacher.clip": 1.0,
    "teacher.label_smoothing": 0.0,
    "teacher.arch": "resnet18",
    "teacher.args": {},
    "teacher.pretrained": False,
    "teacher.weights": None,
    "teacher.ds_config": {},
    "targets.views": 1,
    "targets.top_k": None,
    "graph.scope": "dataset",
    "graph.dim": 64,
    "graph.candidates": 20,
    "graph.neighbours": 10,
    "graph.fanouts": [12, 8],
    "graph.second_hop": "sampled",
    "graph.sampler": "table",
    "graph.query": "live",
    "graph.parts": 2,
    "graph.partitioner": "metis",
    "graph.start_epoch": 2,
    "graph.warmup_epochs": 1.0,
    "graph.refresh_epochs": 1,
    "graph.exact": True,
    "graph.recall": 0.95,
    "graph.warm_start": True,
    "graph.probes": 8,
    "graph.repartition_cut": 1.5,
    "graph.move_gain": 4,
    "student.epochs": 10,
    "student.global_batch": 256,
    "student.lr": 0.001,
    "student.warmup_epochs": 1.0,
    "student.weight_decay": 0.05,
    "student.clip": 1.0,
    "student.label_smoothing": 0.0,
    "student.stem": "resnet_tiny",
    "student.stem_args": {},
    "student.dim": 128,
    "student.hidden": 128,
    "student.label_dim": 32,
    "student.distill_weight": 0.9,
    "student.temperature": 2.0,
    "student.self_loss": 0.5,
    "student.neighbour_loss": 0.0,
    "student.ds_config": {},
    "evaluate.batch": 256,
    "evaluate.gallery": 24,
    "teacher.optimizer": "adamw",
    "teacher.momentum": 0.9,
    "teacher.bias_lr": 1.0,
    "student.optimizer": "adamw",
    "student.momentum": 0.9,
    "student.bias_lr": 1.0,
    "teacher.head_lr": 1.0,
    "student.stem_lr": 1.0,
    "teacher.schedule": "cosine",
    "teacher.lr_start": None,
    "teacher.lr_peak_at": None,
    "teacher.lr_final": None,
    "teacher.average": "none",
    "teacher.average_decay": 0.99,
    "teacher.average_every": 5,
    "teacher.average_ramp": 0.0,
    "student.schedule": "cosine",
    "student.lr_start": None,
    "student.lr_peak_at": None,
    "student.lr_final": None,
    "student.average": "none",
    "student.average_decay": 0.99,
    "student.average_every": 5,
    "student.average_ramp": 0.0,
    "views.padding": "zero",
    "views.flip": "random",
    "views.cutout": 0,
    "views.randaugment": 0,
    "views.magnitude": 9,
    "views.hook": "",
    "teacher.mixup": 0.0,
    "teacher.cutmix": 0.0,
    "evaluate.flip": False,
    "student.logit_adjust": 0.0,
    "targets.logits": None,
    "student.weights": None,
    "data.unlabelled": False,
    "teacher.early_size": None,
    "teacher.early_share": 0.6,
    "student.early_size": None,
    "student.early_share": 0.6,
    "graph.gate_lr": 1.0,
    "student.max_micro_batch": 256,
    "version.calibration": 1,  # 2: the rule for sets of 28 Nov 2026 (``inference/sets``); keys of the images
    "version.decoding": 1,
    "version.frozen": 1,  # 2: parameters of rate 0 don't count in the norm that is clipped
    "version.neighbours": 1,  # 2: weights and second hops of the graph are not rounded to 8 or 11 bits
    "version.late_decay": 1,  # 2: plain Adam gathers no moments of the decay before the graph's parameters start
    "version.rank_norms": 1,  # 2: under ZeRO-3, too, targets come from the mean of the ranks' statistics
    "version.unlabelled": 1,  # 2: the teacher's batches have labelled images only
    "version.unlabelled_parts": 1,  # 2: images without a label follow their nearest; 3: partitions stay balanced
    "version.logit_adjust": 1,  # the classes' shares of the labels; 2: of the targets; 3: of readable images
}
