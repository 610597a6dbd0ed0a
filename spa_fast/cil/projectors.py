"""Task-specific projectors: one per task and modality, summed; those of earlier tasks are frozen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from spa_fast.project import project

Form = Literal["residual_zero", "linear", "identity_first", "mlp"]
Aggregate = Literal["sum", "mean", "latest"]


class ProjectorBank(nn.Module):
    """Sum of per-task projectors over features [..., D] -> [..., D].

    Forms: `residual_zero` z + sum_t A_t z with A_t starting at zero; `linear` sum_t A_t z in torch's
    default initialisation; `identity_first` sum_t A_t z with A_1 = I and later A_t = 0; `mlp`
    z + sum_t W_t relu(V_t z) with W_t starting at zero. All but `mlp` fold into one matrix, which is also
    how they are applied: the cost of a forward pass does not grow with the number of tasks. A bank without
    tasks is the identity.

    Args:
        width: D.
        form: see above.
        bias: whether projectors have one.
        aggregate: `sum` over tasks, their `mean`, or only the `latest`.
        backend: as in `project`.
    """

    def __init__(
        self,
        width: int,
        *,
        form: Form = "residual_zero",
        bias: bool = True,
        aggregate: Aggregate = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.width = width
        self.form = form
        self.bias = bias
        self.aggregate = aggregate
        self.backend = backend
        self.tasks = nn.ModuleList()

    def add_task(self) -> None:
        """Freeze every projector so far and append a trainable one."""
        self.requires_grad_(False)
        first = len(self.tasks) == 0
        last = nn.Linear(self.width, self.width, self.bias)
        with torch.no_grad():
            if self.form != "linear":
                nn.init.eye_(last.weight) if self.form == "identity_first" and first else last.weight.zero_()
                if self.bias:
                    last.bias.zero_()
        if self.form == "mlp":
            self.tasks.append(nn.Sequential(nn.Linear(self.width, self.width, self.bias), nn.ReLU(), last))
        else:
            self.tasks.append(last)

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the newest task's projector."""
        return [p for p in self.parameters() if p.requires_grad]

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D] of the one linear map that equals the whole bank.

        Raises:
            ValueError: the form is `mlp`, which is not linear.
        """
        if self.form == "mlp":
            raise ValueError("fold: form 'mlp' is not linear and cannot be folded into one matrix")
        layers = [layer for layer in self._used() if isinstance(layer, nn.Linear)]
        device = layers[0].weight.device if layers else None
        weight, bias = torch.eye(self.width, device=device), torch.zeros(self.width, device=device)
        if layers and self.form != "residual_zero":
            weight = torch.zeros_like(weight)
        for layer in layers:
            weight = weight + self._share() * layer.weight
            if self.bias:
                bias = bias + self._share() * layer.bias
        return weight, bias

    def forward(self, z: Tensor) -> Tensor:
        if self.form != "mlp":
            return project(z, *self.fold(), backend=self.backend)
        out = z
        for layer in self._used():
            out = out + self._share() * layer(z)
        return out

    def _share(self) -> float:
        return 1.0 / len(self.tasks) if self.aggregate == "mean" else 1.0

    def _used(self) -> list[nn.Module]:
        layers = list(self.tasks)
        return layers[-1:] if self.aggregate == "latest" else layers
