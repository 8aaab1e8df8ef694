"""Checks in a single process: installed packages, search, the student's numbers, throughput."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_checking import Outcome, Setting, Skip
from torch import Tensor, nn

from cnn2gnn_dist.graph.block import block_ids
from cnn2gnn_dist.graph.sampler import make_sampler
from cnn2gnn_dist.models.block import Block, averaged_block
from cnn2gnn_dist.models.cost import count_flops
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.student import Student, StudentOutput

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "dgl", "ray", "faiss-cpu", "webdataset",
            "simplejpeg", "pyarrow", "numpy")  # fmt: skip
LOGITS, GRADIENTS, BFLOAT16, HEAD = 1e-3, 1e-2, 5e-2, 1e-5
"""Maximum relative differences: of float32 from the CPU, of bfloat16 from float32, of z."""


def environment(setting: Setting) -> Outcome:
    """Versions and devices; missing packages are listed, since later checks are skipped without them."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if setting.device == "cuda":
        if not torch.cuda.is_available():
            return Outcome(False, "torch finds no GPU", found)
        found["cuda"], found["nccl"] = torch.version.cuda, list(torch.cuda.nccl.version())
        found["bfloat16"] = torch.cuda.is_bf16_supported()
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            found[f"gpu {number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    missing = [name for name, version in found.items() if version == "not installed"]
    where = found.get("gpu 0", f"cpu, {torch.get_num_threads()} threads")
    lacks = f"; not installed: {', '.join(missing)}" if missing else ""
    return Outcome(True, f"python {found['python']}, torch {found['torch']}, {where}{lacks}", found)


def search(setting: Setting) -> Outcome:
    """The device's search finds the nearest rows of a float64 reference, including duplicates."""
    from cnn2gnn_dist.graph.search.knn import Index

    nodes, queries, m, dim = (3000, 200, 16, 32) if setting.toy else (200_000, 2000, 24, 64)
    rng = np.random.default_rng(0)
    base = rng.normal(size=(nodes, dim)).astype(np.float32)
    base[nodes // 2 :: 7] = base[0]  # ties that extend beyond any number of neighbors
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    rows = rng.choice(nodes, queries, replace=False)
    try:
        index = Index(base, device=setting.device)
    except ImportError as error:
        raise Skip(str(error)) from None
    begin = time.perf_counter()
    with torch.autocast(setting.device, torch.bfloat16):  # where a live search runs
        found, _ = index.search(base[rows], m, exclude=rows)
    seconds = time.perf_counter() - begin
    near = base[rows].astype(np.float64) @ base.T.astype(np.float64)
    near[np.arange(queries), rows] = -np.inf
    least = np.partition(near, -m, axis=1)[:, -m]
    hits = np.take_along_axis(near, found.astype(np.int64), 1) >= least[:, None] - 1e-6
    distinct = all(len(set(row)) == m for row in found.tolist())
    seen = count_flops(lambda: index.search(base[rows], m, exclude=rows)) / queries
    once = 2.0 * nodes * dim
    numbers = {
        "recall": float(hits.mean()),
        "queries_per_s": queries / seconds,
        "flops_said_over_true": index.flops_per_query / once,
        "flops_seen_by_the_counter_over_true": seen / once,
    }
    return Outcome(
        numbers["recall"] == 1.0 and distinct and index.flops_per_query == once,
        f"recall {numbers['recall']:.4f} of {nodes:,} nodes, {queries / seconds:,.0f} queries/s; FLOPs estimated "
        f"{index.flops_per_query / once:.0f}x, seen by the counter {seen / once:.0f}x",
        numbers,
    )


def parity(setting: Setting) -> Outcome:
    """Logits and gradients of the student on the device compared with those on the CPU, in float32."""
    numbers: dict[str, Any] = {}
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    reference = _pass(setting, "cpu")
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        found = _pass(setting, setting.device)
        name = "tf32" if tf32 else "float32"
        numbers[f"{name}_logits"] = _apart(found[0].logits_BC, reference[0].logits_BC)
        numbers[f"{name}_gradients"] = _apart(found[1], reference[1])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    holds = numbers["float32_logits"] < LOGITS and numbers["float32_gradients"] < GRADIENTS
    return Outcome(
        holds,
        f"logits {numbers['float32_logits']:.1e}, gradients {numbers['float32_gradients']:.1e} apart; with TF32 "
        f"{numbers['tf32_logits']:.1e}, {numbers['tf32_gradients']:.1e}",
        numbers,
    )


def autocast(setting: Setting) -> Outcome:
    """Under bfloat16 autocast: logits are near those of float32, z is exactly the float32 head's output for x."""
    plain, _ = _pass(setting, setting.device)
    rounded, _ = _pass(setting, setting.device, torch.bfloat16)
    model = _student(setting).to(setting.device)
    model.train()
    assert model.head is not None
    with torch.no_grad():
        z_Bd = model.head(rounded.x_BD.float())
    numbers = {
        "logits": _apart(rounded.logits_BC, plain.logits_BC),
        "z": float((rounded.z_Bd.detach() - z_Bd).abs().max()),
        "z_dtype": str(rounded.z_Bd.dtype),
        "weights_dtype": str(rounded.weights_BF.dtype) if rounded.weights_BF is not None else "",
    }
    whole = rounded.z_Bd.dtype == torch.float32 and numbers["weights_dtype"] == "torch.float32"
    return Outcome(
        whole and numbers["z"] < HEAD and numbers["logits"] < BFLOAT16,
        f"logits {numbers['logits']:.1e} from float32's; z {numbers['z_dtype']}, {numbers['z']:.1e} from the "
        "float32 head's",
        numbers,
    )


def gather(setting: Setting) -> Outcome:
    """How far the gradients of a step differ when it is repeated: what "exact" can mean here."""
    times = 5 if setting.toy else 20
    first = _pass(setting, setting.device)[1]
    spread = [_apart(_pass(setting, setting.device)[1], first) for _ in range(times)]
    alike = sum(one == 0 for one in spread)
    return Outcome(
        True,
        f"{alike} of {times} repetitions bit-identical, at most {max(spread):.1e} apart",
        {"apart": spread},
    )


def throughput(setting: Setting) -> Outcome:
    """Teacher steps: float32, bfloat16 autocast, the same in channels_last; peak memory."""
    from cnn2gnn_dist.compat import import_timm

    timm = import_timm()
    name, side, batch, steps = ("resnet18", 32, 8, 2) if setting.toy else ("resnet50", 224, 128, 20)
    small = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]} if setting.toy else {}
    numbers: dict[str, Any] = {}
    for kind in ("float32", "bfloat16", "channels_last"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100, **small).to(setting.device).train()
        images = torch.rand(batch, 3, side, side, device=setting.device)
        if kind == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters())
        labels = torch.randint(0, 100, (batch,), device=setting.device)
        _reset_peak(setting)

        def step(
            model: nn.Module = model,
            images: Tensor = images,
            optimizer: torch.optim.Optimizer = optimizer,
            labels: Tensor = labels,
            low: bool = kind != "float32",
        ) -> None:
            with torch.autocast(setting.device, torch.bfloat16, enabled=low):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        numbers[f"{kind}_images_per_s"] = batch * steps / _seconds(step, steps, setting)
        numbers[f"{kind}_peak_gib"] = _peak_gib(setting)
    best = numbers["channels_last_images_per_s"]
    return Outcome(
        all(value > 0 for value in numbers.values()),
        f"{name}, {side} px: {numbers['float32_images_per_s']:,.0f} / {numbers['bfloat16_images_per_s']:,.0f} / "
        f"{best:,.0f} images/s (float32 / bfloat16 / channels_last), "
        f"{numbers['channels_last_peak_gib']:.1f} GiB",
        numbers,
    )


def memory(setting: Setting) -> Outcome:
    """Peak memory and time of a student's step with a full neighborhood, float32 and bfloat16."""
    numbers: dict[str, Any] = {}
    for kind in (None, torch.bfloat16):
        name = "float32" if kind is None else "bfloat16"
        _pass(setting, setting.device, kind)
        _reset_peak(setting)
        numbers[f"{name}_ms"] = 1000 * _seconds(
            lambda kind=kind: _pass(setting, setting.device, kind),  # type: ignore[misc]
            2 if setting.toy else 10,
            setting,
        ) / (2 if setting.toy else 10)  # fmt: skip
        numbers[f"{name}_peak_gib"] = _peak_gib(setting)
    return Outcome(
        True,
        f"float32 {numbers['float32_peak_gib']:.2f} GiB, bfloat16 {numbers['bfloat16_peak_gib']:.2f} GiB"
        + ("" if setting.device == "cuda" else " (the whole process)"),
        numbers,
    )


CHECKS: dict[str, Callable[[Setting], Outcome]] = {
    "environment": environment,
    "search": search,
    "parity": parity,
    "autocast": autocast,
    "gather": gather,
    "throughput": throughput,
    "memory": memory,
}


def _student(setting: Setting) -> Student:
    """The same weights every time, with open gates, so that the neighbors matter."""
    torch.manual_seed(0)
    dim = 32 if setting.toy else 512
    stem = build_stem("conv3" if setting.toy else "resnet18", dim, 32)
    model = Student(
        stem, dim, 16 if setting.toy else 64, dim, 10, 8, 4 if setting.toy else 12, "dataset",
        (0.5,) * 3, (0.25,) * 3,
    )  # fmt: skip
    nn.init.constant_(model.gnn.gate1, 0.5)
    nn.init.constant_(model.gnn.gate2, 0.5)
    return model


def _block(setting: Setting, model: Student, seeds: int) -> Block:
    """Random neighbors in a random bank, with both hops sampled."""
    assert model.head is not None
    graph_dim, dim = model.head.project.weight.shape
    nodes, width, fanouts = (500, 8, (6, 4)) if setting.toy else (100_000, 24, (16, 10))
    rng = np.random.default_rng(1)
    table = np.stack([rng.choice(nodes, width, replace=False) for _ in range(nodes)])
    sampler = make_sampler("table", table.astype(np.int32), 0, np.arange(nodes))
    first = table[:seeds, : fanouts[0]].astype(np.int64)
    ids = block_ids(sampler, first, np.arange(seeds), fanouts[1], epoch=0, step=0, rank=0)
    generator = torch.Generator().manual_seed(2)
    x_ND = torch.randn(nodes, dim, generator=generator)
    z_Nd = F.normalize(torch.randn(nodes, graph_dim, generator=generator), dim=1)
    labels_N = torch.randint(0, 10, (nodes,), generator=generator)
    rows = torch.from_numpy(ids.nodes_V)
    named = ("first_U", "row_of_BF", "second_UG", "seed_B")
    indices = {name: torch.from_numpy(getattr(ids, name)) for name in named}
    return averaged_block(x_ND[rows], z_Nd[rows], labels_N[rows], k=model.k, **indices)


_ready: dict[str, Any] = {}


def _pass(
    setting: Setting, device: str, low: torch.dtype | None = None
) -> tuple[StudentOutput, Tensor]:
    """Output and all gradients, concatenated, of one forward and backward pass of the same student."""
    seeds = 16 if setting.toy else 256
    model = _student(setting).to(device).train()
    if "block" not in _ready:  # sampling a large table takes a while
        _ready["block"] = _block(setting, model, seeds)
    block = _ready["block"].to(device)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (seeds, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (seeds,), generator=generator).to(device)
    with torch.autocast(device, low or torch.bfloat16, enabled=low is not None):
        output = model(images.to(device), block)
        loss = F.cross_entropy(output.logits_BC, labels)
        loss = loss + F.cross_entropy(output.self_logits_BC, labels)
    loss.backward()
    gradients = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return output, torch.cat(gradients)


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference relative to the norm of the expected value."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def _seconds(step: Callable[[], Any], steps: int, setting: Setting) -> float:
    step()
    _synchronise(setting)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronise(setting)
    return time.perf_counter() - begin


def _synchronise(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(setting: Setting) -> float:
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
