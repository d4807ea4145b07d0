"""Which rank-1 components stay: scores, masks and the orthogonality gradient, for all layers of one shape at a time.

A component i of a layer is the triplet (row i of A, gate E_i, column i of B), of weight change ``s E_i B_i A_iᵀ``.

    sensitivity (AdaLoRA, arXiv 2303.10512, eq. 7-12):
        I = |w dL/dw|      Ī <- β1 Ī + (1-β1) I      Ū <- β2 Ū + (1-β2) |I - Ī|      s(w) = Ī Ū
        score_i = s(E_i) + mean s(A_i) + mean s(B_i)
    magnitude (arXiv 2405.17357):
        score_i = ||s E_i B_i A_iᵀ||_F = |s E_i| ||A_i|| ||B_i||        no state
    orthogonality (arXiv 2303.10512, eq. 5, as a mean of norms over the N matrices, as PEFT has it):
        R = 1/N sum ||A Aᵀ - I||_F + ||Bᵀ B - I||_F      dR/dA = (2/N) C A / ||C||_F,  C = A Aᵀ - I

Shapes: A (r, in), E r elements, B (out, r); stacked, L layers: A (L, r, in), E (L, r), B (L, out, r).
Everything runs on the parameters' device; no function waits for it. Launches grow with the number of groups, not of
layers, but for stacking lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

__all__ = ["RankAllocator", "Triplet", "add_orthogonality_gradient_"]

Scorer = Literal["sensitivity", "magnitude"]
Tensors = list[torch.Tensor]


class Triplet(NamedTuple):
    """The trainable factors of one layer.

    Attributes:
        path: name of the layer in the model.
        A: ``(r, in)``.
        B: ``(out, r)``.
        E: ``r`` elements of any shape.
        scaling: factor between ``B diag(E) A`` and the weight change, the gate's own factor included.
    """

    path: str
    A: torch.Tensor
    B: torch.Tensor
    E: torch.Tensor
    scaling: float


@dataclass
class _Group:
    """Layers of one shape, device and dtype; ``at`` are their places in the allocator's list."""

    at: list[int]
    A: Tensors
    B: Tensors
    E: Tensors
    scaling_L1: torch.Tensor
    keep_LR: torch.Tensor  # bool
    multiply: Tensors  # the mask as numbers, one view a layer in the shape of E
    multiply_LR: torch.Tensor
    # of sensitivity: Ī and Ū of A, B and E stacked, and the same memory as one list of views, layer by layer
    average: Tensors
    deviation: Tensors
    average_views: Tensors
    deviation_views: Tensors
    growth_LR: torch.Tensor | None  # of a constant budget: EMA of |dL/dE|

    @property
    def parameters(self) -> Tensors:
        return [*self.A, *self.B, *self.E]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        names = ("A", "B", "E")
        tensors = {"keep": self.keep_LR}
        tensors |= {f"average_{n}": t for n, t in zip(names, self.average, strict=False)}
        tensors |= {f"deviation_{n}": t for n, t in zip(names, self.deviation, strict=False)}
        if self.growth_LR is not None:
            tensors["growth"] = self.growth_LR
        return tensors


class RankAllocator:
    """Scores the components of all layers of an adapter and keeps a given number of them.

    Args:
        triplets: the layers, in the model's order, which also breaks ties.
        scorer: ``"sensitivity"`` or ``"magnitude"``.
        beta1: of the average Ī (and of the growth score).
        beta2: of the deviation Ū.
        start: ranks kept at first, spread evenly over the layers; None for all. Fewer than all makes an allocator
            that can also bring components back (``move_``).
    """

    def __init__(
        self,
        triplets: Sequence[Triplet],
        *,
        scorer: Scorer = "sensitivity",
        beta1: float = 0.85,
        beta2: float = 0.85,
        start: int | None = None,
    ) -> None:
        self.paths = [t.path for t in triplets]
        self.ranks = [t.E.numel() for t in triplets]
        self.scorer = scorer
        self.beta1, self.beta2 = beta1, beta2
        places: dict[object, list[int]] = {}
        for i, t in enumerate(triplets):
            places.setdefault((t.A.shape, t.B.shape, t.E.shape, t.A.device, t.A.dtype, t.E.dtype), []).append(i)
        kept = self.ranks if start is None else _spread(start, self.ranks)
        self.groups = [
            _make_group([triplets[i] for i in at], at, [kept[i] for i in at], scorer, grows=start is not None)
            for at in places.values()
        ]
        # places of the groups' components, one after another, in the order of the model
        offsets = torch.tensor([0, *self.ranks]).cumsum(0).tolist()
        order = [list(range(offsets[i], offsets[i + 1])) for group in self.groups for i in group.at]
        self._order = torch.tensor([place for part in order for place in part], device=self.groups[0].keep_LR.device)

    @property
    def total(self) -> int:
        """Components of all layers."""
        return sum(self.ranks)

    @torch.no_grad()
    def observe(self) -> None:
        """Take the gradients of one optimizer step into the averages, where there are any.

        Raises:
            RuntimeError: no parameter has a gradient any more.
        """
        if self.scorer == "magnitude" and all(group.growth_LR is None for group in self.groups):
            return
        if all(p.grad is None for group in self.groups for p in group.parameters):
            raise RuntimeError(
                "AdaLoraCallback: no gradients at on_optimizer_step, so components cannot be scored; the optimizer or "
                "its engine has cleared them (DeepSpeed, optimizers that step inside backward); possible: an "
                "optimizer that leaves gradients until zero_grad."
            )
        for group in self.groups:
            if group.growth_LR is not None:
                grads = torch.stack([_grad(E) for E in group.E]).view_as(group.growth_LR).abs_()
                group.growth_LR.lerp_(grads.to(group.growth_LR.dtype), 1 - self.beta1)
            if self.scorer == "magnitude":
                continue
            parameters = group.parameters
            grads_list = [_grad(p) for p in parameters]
            if all(p.dtype == v.dtype for p, v in zip(parameters, group.average_views, strict=True)):
                now = list(torch._foreach_mul(parameters, grads_list))
            else:  # half precision: products in float32
                now = [torch.empty_like(v) for v in group.average_views]
                torch._foreach_copy_(now, parameters)
                torch._foreach_mul_(now, grads_list)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(group.average_views, now, 1 - self.beta1)
            torch._foreach_sub_(now, group.average_views)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(group.deviation_views, now, 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """Score of every component, in the order of the model, shape ``(total,)``, on the first layer's device."""
        return self._gather([self._group_scores(group) for group in self.groups])

    def _group_scores(self, group: _Group) -> torch.Tensor:
        if self.scorer == "magnitude":
            A, B = torch.stack(group.A), torch.stack(group.B)
            norms = torch.linalg.vector_norm(A, dim=2) * torch.linalg.vector_norm(B, dim=1)
            E = torch.stack(group.E).view_as(norms)
            scores: torch.Tensor = (norms * E.abs()).to(group.scaling_L1.dtype) * group.scaling_L1
            return scores
        of_A, of_B, of_E = (a * d for a, d in zip(group.average, group.deviation, strict=True))
        return of_E + of_A.mean(2) + of_B.mean(1)

    @torch.no_grad()
    def keep_(self, budget: int) -> None:
        """Keep the ``budget`` components of the highest scores and zero the gates of all others.

        Of equal scores the later ones stay, so the result depends on nothing but the values.
        """
        scores = self.scores()
        keep = torch.ones_like(scores, dtype=torch.bool)
        if budget < self.total:
            keep.index_fill_(0, torch.argsort(scores, stable=True)[: self.total - budget], False)
        self._set_keep(keep)
        self.hold_()

    @torch.no_grad()
    def move_(self, count: int, budget: int) -> None:
        """Zero the gates of the ``count`` kept components of lowest score and let as many others grow from zero.

        Those that grow have the largest average ``|dL/dE|`` among the components that were off before: the first-order
        gain of a step from zero (Evci et al. 2020, arXiv 1911.11134). ElaLoRA (arXiv 2504.00254) ranks layers instead.

        Args:
            count: components to exchange; at most as many as are kept, and as are off.
            budget: number of components that are kept, before and after.
        """
        count = min(count, budget, self.total - budget)
        if count <= 0:
            return
        keep = self._gather([group.keep_LR for group in self.groups])
        scores = self.scores()
        growth = self._gather([group.growth_LR for group in self.groups if group.growth_LR is not None])
        out = torch.argsort(scores.masked_fill(~keep, torch.inf), stable=True)[:count]
        back = torch.argsort(growth.masked_fill(keep, -torch.inf), descending=True, stable=True)[:count]
        keep.index_fill_(0, out, False)
        keep.index_fill_(0, back, True)
        self._set_keep(keep)
        self.hold_()

    @torch.no_grad()
    def hold_(self) -> None:
        """Zero the gates of all components that are not kept."""
        for group in self.groups:
            torch._foreach_mul_(group.E, group.multiply)

    @torch.no_grad()
    def keep_nonzero(self) -> None:
        """Keep the components whose gates are not zero, as a frozen pattern left them."""
        for group in self.groups:
            group.keep_LR.copy_(torch.stack(group.E).view_as(group.keep_LR) != 0)
            group.multiply_LR.copy_(group.keep_LR)

    def kept(self) -> dict[str, int]:
        """Components kept in each layer; one host synchronisation."""
        device = self.groups[0].keep_LR.device
        counts = torch.cat([g.keep_LR.sum(1).to(device, non_blocking=True) for g in self.groups]).tolist()
        by_place = dict(zip((i for group in self.groups for i in group.at), counts, strict=True))
        return {path: by_place[i] for i, path in enumerate(self.paths)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of the state, group by group; the groups follow from the layers."""
        return {f"group_{i}.{name}": t for i, group in enumerate(self.groups) for name, t in group.state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it is that of other layers, ranks or options.
        """
        own = self.state_dict()
        wrong = [name for name in sorted(own.keys() | state.keys()) if name not in own or name not in state]
        wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"the state is of other layers, ranks or options: {', '.join(wrong[:4])}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for group in self.groups:
            group.multiply_LR.copy_(group.keep_LR)

    def _gather(self, parts: Tensors) -> torch.Tensor:
        """``(L, r)`` of each group -> ``(total,)`` in the order of the model."""
        device = parts[0].device
        flat = torch.cat([part.flatten().to(device, non_blocking=True) for part in parts])
        if len(parts) == 1:
            return flat
        return torch.empty_like(flat).index_copy_(0, self._order, flat)

    def _set_keep(self, keep: torch.Tensor) -> None:
        flat = keep if len(self.groups) == 1 else keep[self._order]
        parts = torch.split(flat, [group.keep_LR.numel() for group in self.groups])
        for group, part in zip(self.groups, parts, strict=True):
            group.keep_LR.copy_(part.view_as(group.keep_LR))
            group.multiply_LR.copy_(group.keep_LR)


def _make_group(triplets: list[Triplet], at: list[int], kept: list[int], scorer: Scorer, *, grows: bool) -> _Group:
    A, B, E = [t.A for t in triplets], [t.B for t in triplets], [t.E for t in triplets]
    L, r, device = len(triplets), E[0].numel(), E[0].device
    state = torch.promote_types(A[0].dtype, torch.float32)
    keep = torch.arange(r).expand(L, r) < torch.tensor(kept)[:, None]
    multiply = keep.to(device, E[0].dtype)
    average, deviation = (
        [torch.zeros(L, *part[0].shape, dtype=state, device=device) for part in (A, B, E)]
        if scorer == "sensitivity"
        else []
        for _ in range(2)
    )
    average_views, deviation_views = ([view for t in part for view in t.unbind()] for part in (average, deviation))
    for part in (average, deviation):  # of E as (L, r); the views share its memory
        part[2:] = [t.view(L, r) for t in part[2:]]
    return _Group(
        at,
        A,
        B,
        E,
        torch.tensor([[abs(t.scaling)] for t in triplets], dtype=state, device=device),
        keep.to(device),
        [row.view_as(e) for row, e in zip(multiply.unbind(), E, strict=True)],
        multiply,
        average,
        deviation,
        average_views,
        deviation_views,
        torch.zeros(L, r, dtype=state, device=device) if grows else None,
    )


def _spread(total: int, sizes: list[int]) -> list[int]:
    """``total`` split as evenly as ``sizes`` allow, the rest to the first."""
    given = [0] * len(sizes)
    while total > 0:
        open_ = [i for i, size in enumerate(sizes) if given[i] < size]
        share = max(total // len(open_), 1)
        for i in open_:
            more = min(share, sizes[i] - given[i], total)
            given[i] += more
            total -= more
    return given


def _grad(p: torch.Tensor) -> torch.Tensor:
    """The gradient; zeros for a parameter that took no part in the step."""
    return torch.zeros_like(p) if p.grad is None else p.grad


@torch.no_grad()
def add_orthogonality_gradient_(groups: Sequence[_Group], weight: float) -> None:
    """Add the gradient of ``weight * R`` to A's and B's gradients: two batched products for each of them a group."""
    count = 2 * sum(len(group.A) for group in groups)
    for group in groups:
        for parameters, rows in ((group.A, True), (group.B, False)):
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            stacked = torch.stack(parameters)
            stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
            # rows of A, columns of B should be orthonormal
            C = torch.bmm(stacked, stacked.mT) if rows else torch.bmm(stacked.mT, stacked)
            C.diagonal(dim1=1, dim2=2).sub_(1)
            norms = torch.linalg.vector_norm(C, dim=(1, 2), keepdim=True)
            C.div_(norms.mul_(count / (2 * weight)).clamp_min_(1e-30))
            gradient = torch.bmm(C, stacked) if rows else torch.bmm(stacked, C)
            torch._foreach_add_([_grad(p) for p in parameters], list(torch.unbind(gradient)))
