"""What requests to a model have cost, and the most that they may cost, counted across threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spa_fast.cil.errors import RunError


class CostCap(RunError):
    """The next request could cost more than was allowed."""


class Budget:
    """Tokens used by all requests and what they cost.

    Args:
        prices: USD per million tokens sent and answered.
        cap: USD that may be spent; None means no cap.

    Attributes:
        used: tokens sent and answered.
    """

    def __init__(self, prices: tuple[float, float] = (0.0, 0.0), cap: float | None = None) -> None:
        self.used = (0, 0)
        self._prices, self._cap = prices, cap
        self._reserved = (0, 0)
        self._changed = threading.Condition()

    def cost(self, sent: int, answered: int) -> float:
        """USD for so many tokens."""
        return (sent * self._prices[0] + answered * self._prices[1]) / 1e6

    @contextmanager
    def request(self, sent: int, answered: int) -> Iterator[Callable[[int, int], None]]:
        """A block that makes one request of at most so many tokens; yields what takes those it really used.

        It waits for requests under way where only what they leave unused can pay for it.

        Raises:
            CostCap: the cap could be passed.
        """
        with self._changed:
            while self._passes(sent, answered):
                if self._reserved == (0, 0):
                    so_far = self.cost(*self.used)
                    raise CostCap(
                        f"--max-cost: ${so_far:.4f} spent, the next request could pass ${self._cap:g}; "
                        "raise it and run the same command again"
                    )
                self._changed.wait()
            self._reserved = (self._reserved[0] + sent, self._reserved[1] + answered)
        taken = [0, 0]

        def take(sent: int, answered: int) -> None:
            taken[:] = sent, answered

        try:
            yield take
        finally:
            with self._changed:
                self._reserved = (self._reserved[0] - sent, self._reserved[1] - answered)
                self.used = (self.used[0] + taken[0], self.used[1] + taken[1])
                self._changed.notify_all()

    def _passes(self, sent: int, answered: int) -> bool:
        """Whether a request of so many tokens could pass the cap beside those under way."""
        tokens = [sum(part) for part in zip(self.used, self._reserved, (sent, answered), strict=True)]
        return self._cap is not None and self.cost(tokens[0], tokens[1]) > self._cap
