"""The student of a model: built from its config, run over pixels and the rows of a memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.inference.batch_invariance import make_batch_invariant, smallest_batch
from cnn2gnn_dist.inference.folder.artefact import ModelConfig
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.models.block import Block, averaged_block, nearest
from cnn2gnn_dist.models.graph_head import squared_distances
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.student import Student


class Rows(Protocol):
    """What a block needs of a memory, or of an edit of one."""

    labels: np.ndarray

    @property
    def trained(self) -> int:
        """The number of classes that have a logit; labels from there on are of new ones."""

    def x(self, ids: np.ndarray) -> np.ndarray:
        """Features of rows."""

    def z(self, ids: np.ndarray) -> np.ndarray:
        """Projections of rows."""

    def candidates(self, ids: np.ndarray) -> np.ndarray:
        """The candidates of live rows, nearest first; -1 = none."""


@dataclass(frozen=True)
class Outputs:
    """What the student gives for B images.

    Attributes:
        logits: float32 [B, C] with the neighbors; self_logits: without them.
        x: float32 [B, D]; z: float32 [B, d] of unit length.
        rows: int64 [B, F], rows of the memory that it attaches to, nearest first; -1 = none.
        weights: float32 [B, F], summing to 1 (0 where there is no row).
        distances: float32 [B, F], squared, of these rows; infinite where there is none.
    """

    logits: np.ndarray
    self_logits: np.ndarray
    x: np.ndarray
    z: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    distances: np.ndarray


def joined(parts: list[Outputs]) -> Outputs:
    """Outputs of several batches as one."""
    return Outputs(*(np.concatenate(column) for column in zip(*map(_fields, parts), strict=True)))


def _fields(made: Outputs) -> tuple[np.ndarray, ...]:
    return tuple(getattr(made, field.name) for field in fields(Outputs))


def build(config: ModelConfig) -> Student:
    """Build the student of a model, with random weights.

    Raises:
        UserError: its stem is unknown here (another version of timm).
    """
    s = config.student
    return Student(
        build_stem(s.stem, s.dim, config.views.size, **s.stem_args),
        dim=s.dim,
        graph_dim=s.graph_dim,
        hidden=s.hidden,
        num_classes=len(config.label_names),
        label_dim=s.label_dim,
        k=config.graph.neighbours,
        scope=config.scope,
        mean=config.views.mean,
        std=config.views.std,
    )


class Network:
    """A student on a device, for inference.

    Args:
        config: of the model.
        weights: its tensors.
        device: "cpu", "cuda", …

    Raises:
        UserError: the weights are of another architecture.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: str) -> None:
        self.config, self.device = config, device
        student = build(config)
        try:
            student.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the weights are of another network: {str(error).splitlines()[-1].strip()}",
                where="model.safetensors",
                remedy="use the versions of cnn2gnn-dist and timm that the model was exported with",
            ) from None
        self.student = student.to(device).eval()
        self._multiple = 1
        if torch.device(device).type == "cpu" and config.scope != "batch":
            make_batch_invariant(self.student)
            self._multiple = smallest_batch(self.student.stem, config.views.size)

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray, memory: Memory | None) -> Outputs:
        """Run the student on uint8 images [B, S, S, 3]; without a memory on its self path."""
        images, count = self._filled_up(images_BHWC), len(images_BHWC)
        query = None
        if self.config.scope == "dataset" and memory is not None and len(memory):
            query = _Query(memory, self.config)
        made = self.student(images, query)
        if query is not None and made.weights_BF is not None:
            rows = query.rows_BF[:count]
            weights = made.weights_BF[:count].float().cpu().numpy()
        else:
            rows, weights = np.empty((count, 0), np.int64), np.empty((count, 0), np.float32)
        z = made.z_Bd[:count].float().cpu().numpy()
        return Outputs(
            logits=made.logits_BC[:count].float().cpu().numpy(),
            self_logits=made.self_logits_BC[:count].float().cpu().numpy(),
            x=made.x_BD[:count].float().cpu().numpy(),
            z=z,
            rows=rows,
            weights=weights,
            distances=_distances(z, rows, memory),
        )

    def row_logits(self, rows: Rows, ids_B: np.ndarray, first_BF: np.ndarray) -> np.ndarray:
        """Logits float32 [B, C] of rows of a memory, as of images that are not in it.

        Args:
            rows: of the memory.
            ids_B: which of them; at most a batch.
            first_BF: the nearest other rows of each; -1 = none.
        """
        return self.logits_among(rows, rows.x(ids_B), rows.z(ids_B), first_BF, ids_B)

    @torch.inference_mode()
    def logits_among(
        self,
        rows: Rows,
        x_BD: np.ndarray,
        z_Bd: np.ndarray,
        first_BF: np.ndarray,
        own_B: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits float32 [B, C] of images among the rows of a memory, from features.

        Args:
            rows: of the memory.
            x_BD: of at most a batch of images.
            z_Bd: of the same images.
            first_BF: the nearest rows of each, other than itself; -1 = none.
            own_B: the rows that the images are themselves; None: they are not in the memory.
        """
        x, z = (torch.from_numpy(np.asarray(part)).float().to(self.device) for part in (x_BD, z_Bd))
        if not (first_BF >= 0).any():
            return _numpy(self.student.gnn(x)[0])
        block = _block(rows, first_BF, self.config.graph.neighbours, own_B).to(self.device)
        apart_BF = squared_distances(z, block.in_slots(block.z_Ud))
        found = nearest(apart_BF, self.student.k, block.present_BF)
        return _numpy(self.student.gnn(x, found.p_BM, block)[0])

    @torch.inference_mode()
    def embed(self, images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x float32 [B, D] and z float32 [B, d] of uint8 images."""
        x_BD, z_Bd = self.student.embed(self._filled_up(images_BHWC))
        count = len(images_BHWC)
        return x_BD[:count].float().cpu().numpy(), z_Bd[:count].float().cpu().numpy()

    def _filled_up(self, images_BHWC: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(images_BHWC))
        if missing := -len(images) % self._multiple:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return images.to(self.device)


def device_of(wanted: str) -> str:
    """A device of torch by its name; "auto": CUDA where there is one.

    Raises:
        UserError: torch has no such device here.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise UserError(
            f"torch has no device {wanted!r} here: {first_line(error)}",
            where="device",
            remedy="auto, cpu, or cuda on a machine with a GPU that torch supports",
        ) from None
    return wanted


def device_of_rank(local_rank: int, ranks: int, gpus: int) -> str:
    """Device of one of several processes that answer side by side, for ``device_of``.

    Args:
        local_rank: of the process, on its host.
        ranks: number of processes on all hosts.
        gpus: that this process sees. With fewer than ranks on the host they are shared in turn; a launcher that
            shows each task one GPU numbers it 0 in each.
    """
    return f"cuda:{local_rank % gpus}" if ranks > 1 and gpus else "auto"


class _Query:
    """The ``models.block.BlockQuery`` of a batch over the live rows of a memory.

    The second hop is averaged here, over the remaining candidates: removed images also disappear from
    the messages of their neighbors.
    """

    def __init__(self, memory: Memory, config: ModelConfig) -> None:
        self.memory, self.graph = memory, config.graph
        self.rows_BF = np.empty((0, 0), np.int64)

    def block(self, z_Bd: Tensor) -> Block:
        """Find the nearest rows of the images, and the candidates of those."""
        memory = self.memory
        wanted = min(self.graph.fanout, len(memory))
        first_BF = memory.nearest(z_Bd.float().cpu().numpy(), wanted)
        self.rows_BF = first_BF
        return _block(memory, first_BF, self.graph.neighbours)


def _block(rows: Rows, first_BF: np.ndarray, k: int, own_B: np.ndarray | None = None) -> Block:
    """Build the block around images from the rows they attach to; ``own_B``: the rows that they are themselves."""
    first_U, row_of = np.unique(first_BF, return_inverse=True)
    row_of_BF = row_of.reshape(first_BF.shape)
    if len(first_U) and first_U[0] < 0:  # there are fewer rows than wanted
        first_U, row_of_BF = first_U[1:], row_of_BF - 1
    second_UM = rows.candidates(first_U).astype(np.int64)
    own = np.empty(0, np.int64) if own_B is None else own_B
    nodes_V = np.unique(np.concatenate([first_U, second_UM[second_UM >= 0], own]))
    place_UM = np.where(second_UM >= 0, np.searchsorted(nodes_V, second_UM), -1)
    labels = rows.labels[nodes_V].astype(np.int64)
    labels[labels >= rows.trained] = -1  # the network has no embedding of a new class
    seed_B = np.full(len(first_BF), -1) if own_B is None else np.searchsorted(nodes_V, own_B)
    return averaged_block(
        torch.from_numpy(rows.x(nodes_V)),
        torch.from_numpy(rows.z(nodes_V)),
        torch.from_numpy(labels),
        first_U=torch.from_numpy(np.searchsorted(nodes_V, first_U)),
        row_of_BF=torch.from_numpy(row_of_BF.astype(np.int64)),
        second_UG=torch.from_numpy(place_UM),
        seed_B=torch.from_numpy(seed_B),
        k=k,
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.float().cpu().numpy()
    return found


def _distances(z_Bd: np.ndarray, rows_BF: np.ndarray, memory: Memory | None) -> np.ndarray:
    if memory is None or not rows_BF.size:
        return np.empty(rows_BF.shape, np.float32)
    near = memory.z(rows_BF.clip(min=0).reshape(-1)).reshape(*rows_BF.shape, -1)
    apart = np.square(near - z_Bd[:, None]).sum(-1)
    return np.where(rows_BF >= 0, apart, np.inf).astype(np.float32)
