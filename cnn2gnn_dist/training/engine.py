"""The only module that knows DeepSpeed: start it, wrap a model, step, read and set its state."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives, members, peer_watch, process_group
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.training.average import MOMENTS, Average, Kind, create_state
from cnn2gnn_dist.training.outcome import Outcome, StepInfo
from cnn2gnn_dist.training.parameter_groups import parameter_groups
from cnn2gnn_dist.training.schedule import fresh_adam
from cnn2gnn_dist.training.sync_norm import is_synchronised

_log = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""Seconds that a collective waits for a silent rank."""


def init(
    ranks: Ranks,
    device: str,
    timeout_s: float = TIMEOUT_S,
    about: Mapping[str, Any] | None = None,
    problem: UserError | None = None,
) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs; one OMP thread per CPU rank.

    A dead peer fails the others' next collective at once, a silent one after ``timeout_s``;
    NCCL reports neither, so under it a separate watch ends the process, naming the peer. On CPUs that
    watch ends a rank that waits for something else, such as a lost file server, when its peers are gone.

    Args:
        ranks: this process.
        device: "cpu" or "cuda".
        timeout_s: seconds that a collective waits for a silent rank.
        about: the config by dotted field: all ranks must have the same.
        problem: what keeps this rank from joining; all ranks then raise it.

    Raises:
        UserError: the rendezvous port is taken; on every rank: one can't join (a network interface that
            the environment names is missing, there is no GPU), or they differ (``members``).
    """
    own = torch.device("cpu")
    if device == "cuda" and problem is None:
        try:
            own = _own_gpu(ranks)
        except UserError as error:
            problem = error
    # DeepSpeed uses LOCAL_RANK as the device index.
    index = ranks.local_rank if own.index is None else own.index
    os.environ.update(ranks.environment(), LOCAL_RANK=str(index))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    # ZeRO reduces in a separate group, which DeepSpeed creates without a timeout: torch's default
    # of half an hour would apply.
    c10d = torch.distributed.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    process_group.join(ranks, own, timeout, about, problem)
    _log.debug("joined a group of %d ranks, on %s", ranks.world_size, own)
    _start_deepspeed(device, timeout)
    if ranks.world_size > 1:
        # Gloo's collectives notice a lost peer, but not a rank that never gets to its next one. They
        # report it with more detail, and waits that lie within each other add up: they go first.
        silence_s = 2 * timeout_s + peer_watch.SILENCE_S
        if device == "cuda":
            silence_s = min(peer_watch.SILENCE_S, timeout_s / 2)
        store = c10d._get_default_store()
        _watches.append(
            peer_watch.PeerWatch(store, ranks.rank, ranks.world_size, silence_s=silence_s)
        )


_watches: list[peer_watch.PeerWatch] = []


def explain_lost_peers(reason: Callable[[], UserError | None]) -> None:
    """Let the watch of the peers, if there is one, end this process with the error that a peer has ended with."""
    for watch in _watches:
        watch.reason = reason


def _own_gpu(ranks: Ranks) -> torch.device:
    index = process_group.device_index(ranks.local_rank, torch.cuda.device_count())
    own = torch.device("cuda", index)
    torch.cuda.set_device(own)
    return own


def _start_deepspeed(device: str, timeout: timedelta) -> None:
    """Have DeepSpeed use the existing group, without its log lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    import deepspeed

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if device == "cpu":
        # Otherwise init compiles a C++ operator that training never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        timeout=timeout,
        auto_mpi_discovery=False,
        verbose=False,
    )


def shutdown() -> None:
    """Leave the process group."""
    while _watches:
        _watches.pop().close()
    members.forget()
    if collectives.is_initialised():
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


class Engine:
    """A model under DeepSpeed.

    Args:
        model: on the CPU, with the same weights on every rank.
        config: a resolved DeepSpeed config (``ds_config.resolve``).
        device: "cpu" or "cuda".
        late: names of parameters that get no gradients before some step, ``late_from``: they have a
            separate learning rate, 0 until then, and Adam's bias correction counts from there.
        rates: factors of the learning rate by the names of parameters; 1 for the others.
        average: of the weights over the steps: none, ema or lookahead (``average.Average``).
        name: the stage that trains, for errors: teacher, student or control.

    Vectors and scalars (norms, biases, gates) get no weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        *,
        device: str,
        late: Collection[str] = (),
        rates: Mapping[str, float] | None = None,
        average: Kind = "none",
        name: str = "student",
    ) -> None:
        import deepspeed

        self.device = torch.device("cpu")
        if device == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.zero_stage = int(config["zero_optimization"]["stage"])
        self.accumulation = int(config["gradient_accumulation_steps"])
        self.name, self.steps, self._micro = name, 0, 0
        self.late_from: int | None = None
        """Optimizer steps done when the late parameters start; None: they have not started."""
        self._finite = torch.ones((), device=self.device)
        self._pending: Outcome | None = None
        model.to(self.device)
        config = without_overlap(config, model)
        self.moments = MOMENTS.get(config["optimizer"]["type"], MOMENTS["AdamW"])
        groups = parameter_groups(
            model, config["optimizer"]["params"]["weight_decay"], late, dict(rates or {})
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model, model_parameters=groups, config=config
                )
            except (ValueError, AssertionError, ModuleNotFoundError) as failure:
                # Its checks of keys that we let through, of how they go together, and loggers' packages.
                raise UserError(
                    f"DeepSpeed refuses its config: {' '.join(str(failure).split())[:300]}",
                    where="ds_config.json",
                    remedy="change or remove that key; the packaged file: teacher.ds_config=null "
                    "student.ds_config=null",
                ) from failure
        self.average: Average | None = None
        if average != "none":
            self.average = Average(average, self.deepspeed.optimizer, self.zero_stage, self.module)
            self.create_state(0.0)

    @property
    def module(self) -> nn.Module:
        """The wrapped model."""
        return self.deepspeed.module

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward pass through DeepSpeed."""
        return self.deepspeed(*arguments)

    def train(self) -> None:
        """Switch to training mode."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Switch to evaluation mode."""
        self.deepspeed.eval()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's loss; DeepSpeed divides it by the accumulation."""
        self._finite *= torch.isfinite(loss.detach()).float()
        self.deepspeed.backward(loss)
        self._micro += 1
        if self._micro < self.accumulation:
            self.deepspeed.step()

    def create_state(self, steps: float) -> None:
        """Create the optimizer's state as after ``steps``; torch would create it in the first step."""
        optimizer = self.deepspeed.optimizer
        create_state(optimizer, self.zero_stage, self.moments, steps, self.average is not None)

    def step(
        self,
        lr: float,
        votes: tuple[float, ...] = (),
        late_lr: float | None = None,
        kept: float | None = None,
    ) -> StepInfo:
        """Update the weights at the learning rate ``lr``, late ones at ``late_lr`` (collective).

        ``kept``: then update their average, which keeps this share of itself; None: not at this step.
        ``votes`` are summed over ranks in a collective that runs anyway. Waits for the device;
        ``step_ahead`` does not.

        Raises:
            UserError: a loss since the last step was not finite (the weights are unchanged), or
                the gradient was not (with ZeRO the weights are then corrupt); on every rank.
            RuntimeError: fewer micro-batches than ``accumulation`` have been seen.
        """
        self.settle()
        outcome = self._vote(lr, votes)
        outcome.check_loss()
        outcome.norm = self._plain_norm()
        outcome.check_norm()
        self._update(outcome, late_lr, kept)
        return outcome.read()

    def step_ahead(
        self,
        lr: float,
        votes: tuple[float, ...] = (),
        late_lr: float | None = None,
        kept: float | None = None,
    ) -> StepInfo | None:
        """``step`` without waiting for the device: its outcome is read one step later.

        So the host always has a step queued while the device works on the previous one. Weights
        corrupted by a diverged step are used for at most one more step; call ``settle`` before
        they are evaluated or saved.

        Returns:
            The previous step; None if its outcome has already been read.

        Raises:
            UserError: the previous step diverged; on every rank.
        """
        outcome = self._vote(lr, votes)
        outcome.norm = self._plain_norm()
        self._update(outcome, late_lr, kept)
        outcome.fetch()
        before = self.settle()
        self._pending = outcome
        return before

    def settle(self) -> StepInfo | None:
        """Return the outcome of the last ``step_ahead``, waiting for it; None if none is pending.

        Raises:
            UserError: it diverged; on every rank. Later calls raise it again.
        """
        info = None if self._pending is None else self._pending.read()
        self._pending = None
        return info

    def _vote(self, lr: float, votes: tuple[float, ...]) -> Outcome:
        """Sum over ranks whether losses are finite, and the votes."""
        if self._micro != self.accumulation:
            raise RuntimeError(f"{self._micro} of {self.accumulation} micro-batches seen")
        on_gpu = self.device.type == "cuda"
        own_votes = torch.tensor(votes, dtype=self._finite.dtype, pin_memory=on_gpu)
        own_votes = own_votes.to(self.device, non_blocking=True)
        ballot = collectives.all_reduce_sum(torch.cat([self._finite.reshape(1), own_votes]))
        return Outcome(self.steps, lr, ballot, collectives.world_size(), self.name)

    def _update(self, outcome: Outcome, late_lr: float | None, kept: float | None) -> None:
        """Run the optimizer's step and restart the count of micro-batches."""
        for group in inner_optimizer(self).param_groups:
            rate = self._late(late_lr, group) if group["late"] else outcome.lr
            group["lr"] = rate * group["rate"]
        self.deepspeed.step()
        if outcome.norm is None:
            outcome.norm = self.deepspeed.get_global_grad_norm()
        if self.average is not None and kept is not None:
            self.average.update(kept)
        self._micro = 0
        self._finite.fill_(1.0)
        self.steps += 1

    def _late(self, lr: float | None, group: dict[str, Any]) -> float:
        started = self.late_from is not None and lr is not None
        # SGD and plain Adam add the decay to the gradient, and would gather moments of it at a rate of 0.
        group["weight_decay"] = group["decay"] if started else 0.0
        if self.late_from is None or lr is None:
            return 0.0
        done = self.steps + 1
        since = done - self.late_from
        return lr * fresh_adam(done, since, group["betas"]) if "betas" in group else lr

    def _plain_norm(self) -> Tensor | None:
        """Norm of the gradients, already averaged over ranks, which ZeRO-0 doesn't report; else None."""
        if self.zero_stage:
            return None
        return nn.utils.get_total_norm(
            [p.grad for p in self.module.parameters() if p.grad is not None]
        )

    def average_buffers(self) -> None:
        """Average floating-point buffers over ranks; take rank 0's for the others (collective).

        BatchNorm statistics differ from step 1 on.
        """
        for buffer in self.module.buffers():
            collectives.mean_or_first(buffer)

    @contextlib.contextmanager
    def averaged_buffers(self) -> Iterator[None]:
        """Within this block buffers are averaged, as evaluation needs them (collective).

        Afterwards each rank's own are restored, so that evaluation changes nothing.
        """
        own = [buffer.clone() for buffer in self.module.buffers()]
        self.average_buffers()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, kept in zip(self.module.buffers(), own, strict=True):
                    buffer.copy_(kept)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within this block the weights are those used for inference: their average, if there is one.

        Buffers are averaged over ranks. Afterwards everything is restored (collective).
        """
        if self.average is not None:
            self.average.swap()
        try:
            with self.averaged_buffers():
                yield
        finally:
            if self.average is not None:
                self.average.swap()

    def weights(self) -> dict[str, Tensor]:
        """All fp32 weights and buffers by name, on the CPU of every rank (collective)."""
        found = {name: full_weight(self, p) for name, p in self.module.named_parameters()}
        found.update({name: b.detach().cpu().clone() for name, b in self.module.named_buffers()})
        return found


def without_overlap(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the config for a model whose backward pass contains collectives.

    SyncNorm reduces in the default group, ZeRO in a separate one. Two NCCL communicators active
    at once on one GPU, in an order that may differ between ranks, may deadlock;
    without ``overlap_comm`` all collectives run in order on one stream.
    """
    if not is_synchronised(model):
        return config
    return {**config, "zero_optimization": {**config["zero_optimization"], "overlap_comm": False}}


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer inside ZeRO's wrapper (stage 0 has none)."""
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def full_weight(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """A parameter's full fp32 value on the CPU (collective for ZeRO > 0)."""
    if engine.zero_stage == 0:
        return parameter.detach().float().cpu().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
