"""The loop over tasks: learn, then measure on every class seen so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from spa_fast.cil.data.stream import TaskStream
from spa_fast.cil.methods.base import Method
from spa_fast.cil.metrics import AccuracyMatrix

# Images scored at a time, whose patches are widened to fp32 and projected.
EVAL_BATCH = 64


@dataclass
class Outcome:
    """What a run over all tasks gave.

    Attributes:
        matrix: accuracy matrix.
        learn_seconds: per stage, without feature extraction.
        eval_seconds: per stage.
        figures: per stage what the method reported.
    """

    matrix: AccuracyMatrix = field(default_factory=AccuracyMatrix)
    learn_seconds: list[float] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)


def run_tasks(
    stream: TaskStream, method: Method, on_stage: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Learn every task of the stream and evaluate after each; `on_stage` sees the outcome so far."""
    outcome = Outcome()
    for task in stream:
        start = time.perf_counter()
        outcome.figures.append(method.learn(task))
        learnt = time.perf_counter()
        correct, sizes = evaluate(stream, method, task.index)
        outcome.learn_seconds.append(learnt - start)
        outcome.eval_seconds.append(time.perf_counter() - learnt)
        outcome.matrix.add_stage(correct, sizes)
        on_stage(outcome)
    return outcome


@torch.no_grad()
def evaluate(stream: TaskStream, method: Method, stage: int) -> tuple[list[int], list[int]]:
    """Right answers and images of tasks 0..stage, scored over all classes seen."""
    correct, sizes = [], []
    for task in range(stage + 1):
        features, targets = stream.test(task)
        parts = zip(
            features.globals.split(EVAL_BATCH),
            features.patches.split(EVAL_BATCH),
            targets.split(EVAL_BATCH),
            strict=True,
        )
        correct.append(sum(int((method.scores(g, p).argmax(-1) == y).sum()) for g, p, y in parts))
        sizes.append(len(targets))
    return correct, sizes
