"""The best evaluation of a run so far, and whether it is time to stop."""

import math
from dataclasses import dataclass
from typing import Any

NONE = "none"
LOSS = "loss"


@dataclass
class Best:
    """metric: what decides, loss or one of the judged ones; "none": nothing does. patience: evaluations in a row
    without a better one until the run stops; 0: it never does.

    value, step: of the best one. misses: evaluations since. What is known here belongs into a checkpoint."""

    metric: str = NONE
    patience: int = 0
    value: float | None = None
    step: int = 0
    misses: int = 0

    def update(self, step: int, values: dict[str, float]) -> bool:
        """Count an evaluation; values: its metrics by name. Returns whether it is the best so far."""
        if self.metric == NONE:
            return False
        value = values[self.metric]
        better = self.value is None or (value < self.value if self.metric == LOSS else value > self.value)
        if better and not math.isnan(value):
            self.value, self.step, self.misses = value, step, 0
            return True
        self.misses += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.misses

    def state(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "step": self.step, "misses": self.misses}

    def restore(self, state: dict[str, Any] | None) -> None:
        """What a checkpoint knows; nothing, if it is about another metric."""
        if state is not None and state["metric"] == self.metric:
            self.value, self.step, self.misses = state["value"], state["step"], state["misses"]
