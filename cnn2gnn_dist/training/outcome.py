"""Outcome of an optimizer step, read from the device when that costs no wait."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cnn2gnn_dist.errors import UserError


@dataclass(frozen=True)
class StepInfo:
    """Result of an optimizer step.

    Attributes:
        step: optimizer steps done before it.
        grad_norm: norm of the gradient before clipping; None: unknown.
        lr: learning rate of the step.
        votes: the sums over ranks of the values that each contributed.
    """

    step: int
    grad_norm: float | None
    lr: float
    votes: tuple[float, ...] = ()


class Outcome:
    """A step's votes and the norm of its gradient, kept on the device until they are read.

    Args:
        step: optimizer steps done before it.
        lr: learning rate of the step.
        ballot: sums over ranks, [1 + votes]: ranks whose losses were all finite, then the votes.
        world_size: number of ranks.
        name: the stage that trains: teacher, student or control.
    """

    def __init__(self, step: int, lr: float, ballot: Tensor, world_size: int, name: str) -> None:
        self.step, self.lr, self.world_size, self.name = step, lr, world_size, name
        self.norm: Tensor | float | None = None
        self._ballot = ballot
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def check_loss(self) -> None:
        """Check that the losses were finite; waits for the device.

        Raises:
            UserError: a loss was not finite, on any rank.
        """
        self._require_finite_loss(float(self._ballot[0]))

    def check_norm(self) -> None:
        """Check that the gradient was finite; waits for the device.

        Raises:
            UserError: the gradient was not finite.
        """
        if self.norm is not None:
            self._require_finite_norm(float(self.norm))

    def fetch(self) -> None:
        """Start copying to the host, behind the work queued so far: ``read`` waits for no later work."""
        if self._ballot.device.type != "cuda":
            return
        values = self._values()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copied = host, event

    def read(self) -> StepInfo:
        """Return the outcome; waits until the device has done this step, but no later one.

        Raises:
            UserError: a loss or the gradient was not finite; on every rank.
        """
        if self._copied is None:
            values = self._values()
        else:
            values, event = self._copied
            event.synchronize()
        finite, *votes = values.tolist()
        norm = self.norm
        if isinstance(norm, Tensor):
            norm = votes.pop()
        self._require_finite_loss(finite)
        if norm is not None:
            self._require_finite_norm(norm)
        return StepInfo(self.step, norm, self.lr, tuple(votes))

    def _values(self) -> Tensor:
        if not isinstance(self.norm, Tensor):
            return self._ballot
        return torch.cat([self._ballot, self.norm.detach().reshape(1).to(self._ballot)])

    def _require_finite_loss(self, finite: float) -> None:
        if finite < self.world_size:
            raise self._diverged("loss")

    def _require_finite_norm(self, norm: float) -> None:
        # ZeRO returns -1 for a norm that is not finite.
        if not 0 <= norm < math.inf:
            raise self._diverged("gradient")

    def _diverged(self, what: str) -> UserError:
        section = "teacher" if self.name == "teacher" else "student"
        # The control has the student's fields. With --force the finished student would stay as it was trained.
        how = "--update: the student, which must be trained alike, is trained anew as well"
        if self.name != "control":
            how = "--force: training resumes from its checkpoint"
        return UserError(
            f"the {what} is not finite at step {self.step}",
            where=self.name,
            remedy=f"{section}.lr=… (lower), {section}.warmup_epochs=… (more) or {section}.clip=… (smaller, but not 0, "
            f"which is none), with {how}",
        )
