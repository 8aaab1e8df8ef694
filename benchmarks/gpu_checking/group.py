"""Checks across several ranks: barrier, SyncNorm, ZeRO-3 under autocast, a lost peer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from gpu_checking import Outcome, Setting, Skip
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.training.sync_norm import synchronise_norms

DELAY_S = 1.0
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]},
    "mobilenetv3_small_050": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "tinynet_e": {},
    "regnetx_002": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "ghostnet_050": {"drop_rate": 0.0},
    "rexnet_100": {"depth_mult": 0.5, "drop_rate": 0.0},
    "repvgg_a0": {},
    "levit_128s": {},
}
NORMS, HEAD = 1e-3, 1e-5


def join(setting: Setting, timeout_s: float = 120.0) -> None:
    """Join the process group as a run does; with plain torch where DeepSpeed is not installed."""
    ranks = Ranks.from_environment()
    if setting.ranks == 1:  # a group of one, as under `torchrun --nproc_per_node 1`
        os.environ.update(ranks.environment())
    try:
        from cnn2gnn_dist.training import engine

        engine.init(ranks, setting.device, timeout_s=timeout_s)
    except ImportError:
        if setting.device == "cuda":
            torch.cuda.set_device(ranks.local_rank)
        backend = "nccl" if setting.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def barrier(setting: Setting) -> Outcome:
    """No rank leaves before the last has arrived: first with a late host, then with a busy device."""
    join(setting)
    collectives.barrier()
    numbers: dict[str, Any] = {}
    for kind in ("host", "device"):
        late = setting.rank == 0
        file = setting.out / f".barrier-{setting.ranks}-{kind}"
        file.unlink(missing_ok=True)
        collectives.barrier()
        begin = time.monotonic()
        if late and kind == "device" and setting.device == "cuda":
            # A spinning kernel: what the barrier queues behind it can't finish first.
            torch.cuda._sleep(int(DELAY_S * _cycles_per_second()))
        elif late:
            time.sleep(DELAY_S)
            file.touch()
        came = time.monotonic()
        collectives.barrier()
        numbers[kind] = (came, time.monotonic(), time.monotonic() - begin)
        numbers[f"{kind}_file"] = kind == "device" or file.exists()
        collectives.barrier()
    everyone = collectives.all_gather_object(numbers)
    held = all(_held(kind, everyone) for kind in ("host", "device"))
    waited = [min(one[kind][2] for one in everyone) for kind in ("host", "device")]
    return Outcome(
        held,
        f"{setting.ranks} ranks waited {waited[0]:.2f} s for a late host, {waited[1]:.2f} s for a busy device "
        f"({DELAY_S:.0f} s late)",
        {"waited_s": waited},
    )


def _held(kind: str, everyone: list[dict[str, Any]]) -> bool:
    """Whether all ranks left when the late one had arrived, and not before its delay: they may have begun later."""
    left = min(one[kind][1] for one in everyone)
    _, late_left, late_took = everyone[0][kind]
    return (
        left >= max(one[kind][0] for one in everyone)
        and left - (late_left - late_took) >= 0.9 * DELAY_S
        and all(one[f"{kind}_file"] for one in everyone)
    )


def sync_norm(setting: Setting) -> Outcome:
    """Stems of timm's families: ranks with SyncNorm compared with one process and the whole batch."""
    join(setting)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    names = list(FAMILIES)[: 3 if setting.toy else None]
    apart: dict[str, Any] = {}
    for name in names:
        try:
            apart[name] = _norms_apart(setting, name)
        except UserError as error:
            apart[name] = error.what
    figures = [value for value in apart.values() if isinstance(value, float)]
    refused = [name for name, value in apart.items() if isinstance(value, str)]
    return Outcome(
        bool(figures) and max(figures) < NORMS,
        f"{len(figures)} families, at most {max(figures, default=float('nan')):.1e} apart in outputs, gradients, "
        f"statistics" + (f"; refused: {', '.join(refused)}" if refused else ""),
        apart,
    )


def _norms_apart(setting: Setting, name: str) -> float:
    torch.manual_seed(0)
    alone = build_stem(name, 16, 32, **FAMILIES[name]).to(setting.device).train()
    together = synchronise_norms(deepcopy(alone))
    rows = 4 * setting.ranks
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, 32, 32, generator=generator).to(setting.device)
    own = slice(4 * setting.rank, 4 * setting.rank + 4)
    wanted = alone(images)
    found = together(images[own])
    toward = torch.randn(wanted.shape, generator=generator).to(setting.device)
    (wanted * toward).sum().backward()
    (found * toward[own]).sum().backward()
    pairs = [(found, wanted[own])]
    pairs += [
        (collectives.all_reduce_sum(_gradient(p)), _gradient(q))
        for p, q in zip(together.parameters(), alone.parameters(), strict=True)
    ]
    pairs += [
        (p, q)
        for p, q in zip(together.buffers(), alone.buffers(), strict=True)
        if p.is_floating_point()
    ]
    return max(_apart(p, q, pairs) for p, q in pairs)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _apart(found: Tensor, wanted: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference, relative to the largest value, or to the largest of all where that is tiny."""
    most = max(float(each.detach().abs().max()) for _, each in pairs)
    unit = max(float(wanted.detach().abs().max()), 1e-3 * most)
    return float((found - wanted).detach().abs().max()) / unit


def zero3(setting: Setting) -> Outcome:
    """The graph head keeps float32 weights under ZeRO-3 with autocast: z is as with the unpartitioned weights."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise Skip(str(error)) from None
    from gpu_checking.alone import _student

    from cnn2gnn_dist.training import ds_config
    from cnn2gnn_dist.training.engine import Engine

    join(setting)
    rows = 16
    config = ds_config.resolve(
        ds_config.load(ds_config.PACKAGE.parent / "ds_config.json"),
        world_size=setting.ranks, global_batch=rows * setting.ranks, accumulation=1, lr=1e-3,
        weight_decay=0.0, clip=1.0, device=setting.device, stage=3,
    )  # fmt: skip
    config["torch_autocast"]["enabled"] = True  # on the CPU too, where runs leave it off
    # Otherwise small weights would never be partitioned and gathered.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = Engine(_student(setting), config, device=setting.device)
    engine.train()
    generator = torch.Generator().manual_seed(setting.rank)
    shape = (rows, 32, 32, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(engine.device)
    for _ in range(2):  # weights that bfloat16 can't represent
        output = engine(images, None)
        engine.backward(
            output.logits_BC.float().square().mean() + output.z_Bd[:, 0].square().mean()
        )
        engine.step(1e-2)
    output = engine(images, None)
    weight = engine.weights()["head.project.weight"].to(engine.device)
    with torch.autocast(engine.device.type, enabled=False), torch.no_grad():
        raw = output.x_BD.float() @ weight.T
        norm = torch.nn.functional.batch_norm(raw, None, None, training=True)
        wanted = torch.nn.functional.normalize(norm, dim=1)
    apart = max(collectives.all_gather_object(float((output.z_Bd.detach() - wanted).abs().max())))
    low = str(output.x_BD.dtype)
    return Outcome(
        apart < HEAD and output.z_Bd.dtype == torch.float32,
        f"z at most {apart:.1e} from the float32 weights'; features {low}",
        {"z": apart, "x_dtype": low},
    )


def lost_peer(setting: Setting) -> Outcome:
    """A rank is killed: within the timeout, the others raise an error that counts as a lost peer."""
    if setting.ranks == 1:
        raise Skip("needs two ranks")
    # Gloo notices at once: a timeout there is only for ranks that are slow to start.
    join(setting, timeout_s=20.0 if setting.device == "cuda" else 120.0)
    collectives.barrier()
    if setting.rank == setting.ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < 100:
            collectives.barrier()
    except RuntimeError as error:
        seconds = time.monotonic() - begin
        named = collectives.lost_peer(error)
        said = str(error).splitlines()[0][:120]
        return Outcome(
            named,
            f"{'recognized' if named else 'not recognized'} after {seconds:.1f} s: {said}",
            {"seconds": seconds},
        )
    return Outcome(False, "nothing was noticed in 100 s")


CHECKS: dict[str, Callable[[Setting], Outcome]] = {
    "barrier": barrier,
    "sync_norm": sync_norm,
    "zero3": zero3,
    "lost_peer": lost_peer,
}


def _cycles_per_second() -> float:
    """The measured frequency of the clock that torch.cuda._sleep counts."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    torch.cuda.synchronize()
    return 100_000_000 / (begin.elapsed_time(end) / 1000)
