"""Accuracy over tasks: the raw matrix and the figures of the field drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AccuracyMatrix:
    """R[b][i]: accuracy in percent on the test images of task i after stage b, i <= b.

    Attributes:
        rows: R, row b holds b + 1 entries.
        sizes: number of test images of each task.
    """

    rows: list[list[float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add_stage(self, correct: list[int], sizes: list[int]) -> None:
        """Append stage b from counts of right answers and images for tasks 0..b."""
        if (
            len(correct) != len(sizes)
            or len(sizes) != len(self.rows) + 1
            or sizes[: len(self.sizes)] != self.sizes
        ):
            raise ValueError(
                f"stage {len(self.rows)}: expected counts of {len(self.rows) + 1} tasks, got {len(sizes)}"
            )
        self.sizes = list(sizes)
        self.rows.append([100.0 * c / n for c, n in zip(correct, sizes, strict=True)])

    @property
    def accuracies(self) -> list[float]:
        """A_b: accuracy on all classes seen after stage b, weighted by images."""
        return [
            sum(r * n for r, n in zip(row, self.sizes[: len(row)], strict=True)) / sum(self.sizes[: len(row)])
            for row in self.rows
        ]

    @property
    def average(self) -> float:
        """Mean of A_b over stages."""
        return sum(self.accuracies) / len(self.rows)

    @property
    def last(self) -> float:
        """A_B, after the last stage."""
        return self.accuracies[-1]

    @property
    def forgetting(self) -> float:
        """Mean over earlier tasks of best accuracy before the last stage minus the last; 0 for one task."""
        final = self.rows[-1]
        drops = [max(row[i] for row in self.rows[i:-1]) - final[i] for i in range(len(final) - 1)]
        return sum(drops) / len(drops) if drops else 0.0

    @property
    def bwt(self) -> float:
        """Backward transfer: mean over earlier tasks of last accuracy minus the first; 0 for one task."""
        final = self.rows[-1]
        gains = [final[i] - self.rows[i][i] for i in range(len(final) - 1)]
        return sum(gains) / len(gains) if gains else 0.0

    def square(self) -> list[list[float | None]]:
        """R as a square table, None above the diagonal."""
        return [[*row, *([None] * (len(self.rows) - len(row)))] for row in self.rows]
