"""A graph network over the images of a set: which of them show one class, and which class that is.

Message passing on a complete graph whose edges are learned and may be zero. Input are the images' log-probabilities
a_ic alone and the log-odds o_ij that the features of two images are of one class rather than of two. From s = a, in
each of R rounds:

    q = softmax(s);  agree_ij = log(C Σ_c q_ic q_jc);  u = six numbers about the set (``_about``)
    w_ij = σ(edge(o_ij, agree_ij, u)), w_ii = 0                      do i and j show one class?
    s_ic = a_ic + g · (λ log(C π_c) + Σ_j w_ij (κ a_jc + μ q_jc))

with class shares π_c = (mean_i q_ic + α/m) / (1 + Cα/m), and λ, κ, μ ≥ 0 of a gate that sees u. g = σ(opening(u of
the first round)) closes the edges of strangers; whether a set is related is judged by u before and after all rounds.
w = 1 and κ = 1 with the rest 0 is the mean of logits, which is right for one class; λ = 1 with w = 0 is EM over class
shares (Saerens, Latinne, Decaestecker, 2002); what ``together.py`` (rule T) composes by hand lies between them. Rows
of w don't sum to 1: strangers have no edges.

Nothing depends on which class or which image is which: the same few weights serve any number of classes and of
images, equivariant to both. Shapes: S sets of m images, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

ROUNDS, HIDDEN = 4, 16
ALPHA = 0.02
"""Of the class shares, divided by m: a set of any size starts with the same trust in unseen classes."""
_ABOUT, _LEAST = 6, 1e-6
_CELLS = 8_000_000  # numbers of a layer over pairs that are held at once


class SetNetwork(nn.Module):
    """The network; see the module.

    Args:
        largest: images of the largest set that it learns from. In larger ones, what an image hears from the others
            is scaled down to as much as in a set of that size.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest
        rounds = range(ROUNDS)
        self.pair = nn.ModuleList(nn.Linear(2, HIDDEN) for _ in rounds)
        self.about = nn.ModuleList(nn.Linear(_ABOUT, HIDDEN, bias=False) for _ in rounds)
        self.edge = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in rounds)
        self.gate = nn.ModuleList(_perceptron(3) for _ in rounds)
        self.opening = _perceptron(1)
        self.related = _perceptron(1, 2 * _ABOUT)
        for edge, gate in zip(self.edge, self.gate, strict=True):
            nn.init.constant_(edge.bias, -2.0)  # type: ignore[arg-type]
            nn.init.constant_(gate[-1].bias, -1.0)  # type: ignore[index]

    def forward(
        self, log_p_SmC: torch.Tensor, log_odds_Smm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer S sets of m ≥ 2 images.

        Args:
            log_p_SmC: log-probabilities of each image alone.
            log_odds_Smm: of two images being of one class, by their features.

        Returns:
            Log-probabilities [S, m, C], and the score [S] of being related; 0: as likely as not.
        """
        count, classes = log_p_SmC.shape[1:]
        hears = min(1.0, (self.largest - 1) / (count - 1))
        s_SmC, open_S = log_p_SmC, None
        for at in range(ROUNDS):
            q_SmC = s_SmC.softmax(-1)
            about_SU = self._about(q_SmC, log_odds_Smm)
            if open_S is None:
                first_SU, open_S = about_SU, torch.sigmoid(self.opening(about_SU)[:, 0])
            shares, logits, votes = (
                F.softplus(g_S)[:, None, None] for g_S in self.gate[at](about_SU).unbind(-1)
            )
            alpha = ALPHA / count
            prior_SC = (q_SmC.mean(1) + alpha) / (1 + classes * alpha)
            said_SmC = logits * log_p_SmC + votes * q_SmC
            heard_SmC = self._heard(at, q_SmC, log_odds_Smm, about_SU, said_SmC)
            company_SmC = shares * (classes * prior_SC).log()[:, None] + hears * heard_SmC
            s_SmC = log_p_SmC + open_S[:, None, None] * company_SmC
        last_SU = self._about(s_SmC.softmax(-1), log_odds_Smm)
        score_S = self.related(torch.cat([first_SU, last_SU], -1))[:, 0]
        return s_SmC.log_softmax(-1), score_S

    def _about(self, q_SmC: torch.Tensor, log_odds_Smm: torch.Tensor) -> torch.Tensor:
        """Six numbers about each set.

        Its size; three means over pairs (agreement of answers, log-odds of features, both together:
        log(1 + C Σ_c q_ic q_jc exp o_ij)); how few classes it shows; how unsure its images are.
        """
        sets, count, classes = q_SmC.shape
        agree_S, both_S = q_SmC.new_zeros(sets), q_SmC.new_zeros(sets)
        odds_S = _off_diagonal(log_odds_Smm, slice(0, count)).sum((1, 2))
        for rows in _slices(sets, count, 1):
            agree = _agreement(q_SmC, rows)
            agree_S = agree_S + _off_diagonal(agree, rows).sum((1, 2))
            both = F.softplus(agree + log_odds_Smm[:, rows])
            both_S = both_S + _off_diagonal(both, rows).sum((1, 2))
        pairs = count * (count - 1)
        size = math.log(min(count, self.largest)) - 2.5
        columns = [
            torch.full_like(agree_S, size),
            agree_S / pairs / 3,
            odds_S / pairs / 2,
            both_S / pairs / 3,
            math.log(classes) - _entropy(q_SmC.mean(1)),
            _entropy(q_SmC).mean(-1),
        ]
        return torch.stack(columns, -1)

    def _heard(
        self,
        at: int,
        q_SmC: torch.Tensor,
        log_odds_Smm: torch.Tensor,
        about_SU: torch.Tensor,
        said_SmC: torch.Tensor,
    ) -> torch.Tensor:
        """Σ_j w_ij said_jc, rows in slices: m² · HIDDEN numbers would not fit for large sets."""
        sets, count, _ = q_SmC.shape
        shift_S11H = self.about[at](about_SU)[:, None, None]
        heard = []
        for rows in _slices(sets, count, HIDDEN):
            features = torch.stack([log_odds_Smm[:, rows] / 2, _agreement(q_SmC, rows) / 3], -1)
            hidden = F.silu(self.pair[at](features) + shift_S11H)
            w_Sbm = _off_diagonal(torch.sigmoid(self.edge[at](hidden)[..., 0]), rows)
            heard.append(w_Sbm @ said_SmC)
        return torch.cat(heard, 1)


def _perceptron(outputs: int, inputs: int = _ABOUT) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs))


def _agreement(q_SmC: torch.Tensor, rows: slice) -> torch.Tensor:
    """log(C Σ_c q_ic q_jc) for i in the rows: [S, b, m]."""
    lift_Sbm = q_SmC.shape[2] * (q_SmC[:, rows] @ q_SmC.transpose(1, 2))
    return lift_Sbm.clamp(min=_LEAST).log()


def _off_diagonal(values_Sbm: torch.Tensor, rows: slice) -> torch.Tensor:
    """The values without those of an image and itself."""
    count = values_Sbm.shape[2]
    row_b = torch.arange(rows.start, rows.stop)[:, None]
    return values_Sbm.masked_fill(row_b == torch.arange(count), 0.0)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * (p + _LEAST).log()).sum(-1)  # entr's gradient at 0 is infinite


def _slices(sets: int, count: int, width: int) -> list[slice]:
    step = max(1, _CELLS // (sets * count * width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
