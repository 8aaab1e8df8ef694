"""A field that is set but has no effect is named, with the reason; nothing else causes a note."""

from __future__ import annotations

import pytest

from cnn2gnn_dist import cli, consistency, field_names, presets, settings, unused_fields
from cnn2gnn_dist.unused_fields import Surroundings

CPU, GPU = Surroundings(), Surroundings(on_gpu=True)
RAY, LAUNCHER = Surroundings(inside_ray=True, ranks=2), Surroundings(inside_ray=False, ranks=2)
CLIPS = Surroundings(deepspeed={"teacher": {"gradient_clipping": 3}, "student": {}})
NEAR, FAR = "data.train=/d/a.tar", "data.train=s3://b/a.tar"

IDLE = [  # overrides of the preset demo, the environment, and the beginnings of the notes
    (["data.source=shards", NEAR], CPU, ["data.shard_size=256 has no effect: data.source=shards"]),
    (["data.image_column=img"], CPU, ["data.image_column=img has no effect: only data.source=parquet"]),
    (["data.source=parquet", "data.label_column=y", NEAR], CPU, []),
    ([NEAR], CPU, ["data.train=/d/a.tar has no effect: the images of data.source=digits"]),
    (
        ["data.source=imagefolder", NEAR, "data.test=/d/b"],
        CPU,
        ["data.holdout=0.25 has no effect: the held-out images are a separate"],
    ),
    (["data.source=cifar10", NEAR], CPU, ["data.holdout=0.25 has no effect"]),
    (["data.unlabelled=true"], CPU, ["data.unlabelled=true has no effect: only data.source=shards"]),
    (["data.match_classes=number"], CPU, ["data.match_classes=number has no effect"]),
    (["data.source=imagefolder", NEAR, "data.match_classes=number"], CPU, ["data.match_classes"]),
    (
        ["data.test=/d", "data.holdout=0.2"],
        CPU,
        ["data.test=/d: data.source=digits has one set of images"],
    ),
    (["views.kind=none"], CPU, ["views.pad=3 has no effect: only views.kind=shift and"]),
    (["views.magnitude=5"], CPU, ["views.magnitude=5 has no effect: views.randaugment=0"]),
    (["views.magnitude=5", "views.randaugment=2", "views.cutout=4"], CPU, []),
    (
        ["views.kind=none", "views.cutout=4", "views.flip=alternating"],
        CPU,
        [
            "views.pad=3 has no effect",
            "views.flip=alternating has no effect: only views.kind=crop_flip",
            "views.cutout=4 has no effect: views.kind=none leaves",
        ],
    ),
    (["views.kind=crop_flip", "views.flip=alternating", "views.padding=reflect"], CPU, []),
    (["views.ratio=[1, 1]"], CPU, ["views.ratio=[1.0, 1.0] has no effect"]),
    (["views.kind=random_resized_crop", "views.ratio=[1, 1]", "views.pad=4"], CPU, []),
    (
        ["views.kind=random_resized_crop", "views.pad=4", "stream.decoded_bytes=1e6"],
        CPU,
        ["stream.decoded_bytes=1000000 has no effect: views.kind=random_resized_crop"],
    ),
    (["stream.decoded_bytes=1e6"], CPU, []),
    (["stream.cache_bytes=0"], CPU, ["stream.cache_bytes=0 has no effect: they apply only to remote"]),
    (["data.source=shards", FAR, "data.shard_size=2048", "stream.cache_bytes=9"], CPU, []),
    (
        ["data.source=shards", FAR, "data.shard_size=2048", "stream.cache_bytes=0", "stream.cache_dir=/c"],
        CPU,
        ["stream.cache_dir=/c has no effect: stream.cache_bytes=0"],
    ),
    (["teacher.clip=2", "student.clip=2"], CLIPS, ["teacher.clip=2.0 has no effect: the DeepSpeed"]),
    (["teacher.clip=2"], CPU, []),
    *(
        case
        for m in ("teacher", "student")
        for case in (
            ([f"{m}.lr_final=0.5"], CPU, [f"{m}.lr_final=0.5 has no effect: {m}.schedule=cosine"]),
            (
                [f"{m}.schedule=triangular", f"{m}.warmup_epochs=2", f"{m}.epochs=9"],
                CPU,
                [f"{m}.warmup_epochs=2.0 has no effect: only {m}.schedule=cosine"],
            ),
            ([f"{m}.schedule=one_cycle", f"{m}.warmup_epochs=1", f"{m}.lr_peak_at=.1"], CPU, []),
            ([f"{m}.early_share=.5"], CPU, [f"{m}.early_share=0.5 has no effect: {m}.early_size=null"]),
            ([f"{m}.early_share=.5", f"{m}.early_size=8"], CPU, []),
            ([f"{m}.average_every=2"], CPU, [f"{m}.average_every=2 has no effect: {m}.average=none"]),
            ([f"{m}.average=ema", f"{m}.average_ramp=3"], CPU, []),
        )
    ),
    (["teacher.momentum=0.8"], CPU, ["teacher.momentum=0.8 has no effect: only teacher.optimizer"]),
    (["student.momentum=0.8"], CPU, ["student.momentum=0.8 has no effect: only student.optimizer"]),
    (["student.momentum=0.8", "student.optimizer=sgd"], CPU, []),
    (
        ["student.distill_weight=1", "student.label_smoothing=0.1"],
        CPU,
        ["student.label_smoothing=0.1 has no effect"],
    ),
    (
        ["student.distill_weight=0", "student.temperature=3", "targets.top_k=3"],
        CPU,
        ["student.temperature=3.0, targets.top_k=3 have no effect: student.distill_weight=0"],
    ),
    (
        ["graph.scope=batch", "graph.partition.parts=4", "graph.search.probes=3"],
        GPU,
        [
            "graph.candidates=16, graph.refresh_epochs=2, graph.search.probes=3, "
            "graph.partition.parts=4, graph.sampling.fanouts=[10, 6], "
            "graph.sampling.second_hop=sampled, student.label_dim=16 have no effect: with graph.scope"
        ],
    ),
    (
        ["graph.scope=batch", "student.neighbour_loss=0.1"],
        CPU,
        ["student.neighbour_loss=0.1 has no effect", "graph.candidates=16"],
    ),
    (
        ["graph.scope=batch", "evaluate.gallery=8", "model.thumbnails=32"],
        CPU,
        [
            "graph.candidates=16",
            "evaluate.gallery=8, model.thumbnails=32 have no effect: with graph.scope=batch no",
        ],
    ),
    (["student.label_dim=9", "evaluate.gallery=8", "model.thumbnails=32"], CPU, []),
    (
        ["targets.logits=/d/l.parquet", "targets.views=0", "targets.batch=9", "teacher.clip=2"],
        CLIPS,
        ["teacher.global_batch=64, teacher.lr=0.003, teacher.clip=2.0, teacher.args="],
    ),
    (["graph.search.exact=false"], GPU, ["graph.search.exact=false has no effect: on a GPU"]),
    (["graph.search.exact=false", "graph.search.recall=0.9", "graph.search.probes=3"], CPU, []),
    (
        ["graph.search.recall=0.9", "graph.search.warm_start=no", "graph.search.probes=3"],
        CPU,
        ["graph.search.recall=0.9, graph.search.warm_start=false, graph.search.probes=3 have no effect"],
    ),
    (["graph.search.recall=0.9"], GPU, ["graph.search.recall=0.9 has no effect: on a GPU"]),
    (
        ["graph.partition.parts=1", "graph.partition.partitioner=ranges", "run.ranks=1"],
        CPU,
        ["graph.partition.partitioner=ranges has no effect: graph.partition.parts=1"],
    ),
    (
        ["graph.partition.partitioner=ranges", "graph.partition.move_gain=3"],
        CPU,
        ["graph.partition.move_gain=3 has no effect: graph.partition.partitioner=ranges"],
    ),
    (["graph.partition.partitioner=streaming", "graph.partition.move_gain=3"], CPU, []),
    (
        ["graph.sampling.second_hop=cached", "graph.sampling.sampler=dgl"],
        CPU,
        [
            "graph.sampling.sampler=dgl has no effect: with graph.sampling.query=live",
            "graph.sampling.fanouts[1]=6 has no effect: graph.sampling.second_hop=cached",
        ],
    ),
    (
        [
            *("graph.sampling.second_hop=cached", "graph.sampling.sampler=dgl"),
            *("graph.sampling.query=table", "graph.sampling.fanouts=[10, 0]"),
        ],
        CPU,
        [],
    ),
    (
        ["graph.sampling.query=table", "graph.sampling.fanouts=[30, 20]"],
        CPU,
        ["graph.sampling.fanouts[0]=30 is capped at 16", "graph.sampling.fanouts[1]=20 is capped at 16"],
    ),
    (["graph.sampling.fanouts=[30, 16]"], CPU, []),  # a live search finds as many as requested
    (["cluster.grace_s=9", "checkpoint.grace_s=9"], RAY, ["checkpoint.grace_s=9.0 has no effect: ranks"]),
    (["cluster.grace_s=9", "checkpoint.grace_s=9"], LAUNCHER, ["cluster.grace_s=9.0 has no effect"]),
    (["cluster.grace_s=9", "checkpoint.grace_s=9"], CPU, []),  # the plan can't know the launcher
    (["cluster.address=h:1", "cluster.max_failures=1"], LAUNCHER, ["cluster.address=h:1, cluster.max"]),
    (["cluster.ranks_per_node=1", "cluster.strategy=SPREAD"], CPU, ["cluster.strategy=SPREAD has no"]),
    (
        ["cluster.reader_resources={cpu_host: 1}", "stream.backend=local"],
        RAY,
        ["cluster.reader_resources={'cpu_host': 1.0} has no effect: only stream.backend=ray"],
    ),
    (["cluster.reader_resources={cpu_host: 1}"], RAY, []),
    (["cluster.min_ranks=2"], CPU, ["cluster.min_ranks=2 has no effect: run.ranks is no larger"]),
    (["cluster.min_ranks=1", "run.ranks=2"], CPU, []),
    (["run.ranks=4"], LAUNCHER, ["run.ranks=4 has no effect: the launcher"]),
    (["run.ranks=4"], Surroundings(inside_ray=True, ranks=4), []),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "surroundings", "begin"), IDLE)
def test_a_field_that_does_nothing_is_named_with_the_reason(overrides, surroundings, begin):
    found = consistency.notes(settings.load("demo", overrides), surroundings)
    assert len(found) == len(begin), found
    for note, start in zip(found, begin, strict=True):
        assert note.startswith(start)


@pytest.mark.parametrize("surroundings", [CPU, GPU, RAY, LAUNCHER, CLIPS])
def test_presets_set_nothing_that_does_nothing(surroundings):
    for name in presets.names():
        config = settings.load(name)
        if surroundings.ranks:
            config = settings.load(name, [f"run.ranks={surroundings.ranks}"])
        found = consistency.notes(config, surroundings)
        if name == "imagenet" and surroundings.on_gpu:  # set for users without a GPU
            assert found.pop(0).startswith("graph.search.exact=false")
        if name in ("cifar10", "mini_imagenet_cpu") and surroundings is CLIPS:
            # The SGD recipe does not clip.
            assert found.pop(0).startswith("teacher.clip=0.0")
        assert found == []


def test_every_rule_names_fields_that_there_are_and_is_tried_here():
    idle = [(settings.load("demo", overrides), where) for overrides, where, begin in IDLE if begin]
    tried = {rule.why for rule in unused_fields._RULES if any(rule.when(*case) for case in idle)}
    assert tried == {rule.why for rule in unused_fields._RULES}
    for rule in unused_fields._RULES:
        assert set(rule.fields) <= set(field_names.paths())


def test_a_plan_says_so(capsys, tmp_path):
    command = ["run", "--config", "demo", "--dry-run", f"run.dir={tmp_path}/run"]
    assert cli.main([*command, "views.kind=none"]) == 0
    assert "note: views.pad=3 has no effect: only views.kind=shift and" in capsys.readouterr().out
