"""Warnings in plain words when training goes wrong."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any

import gymnasium as gym
import lightning as L
import numpy as np
from gymnasium import spaces

from lit_rl.distributions import SquashedGaussian
from lit_rl.options import Count, Positive, TakesOptions, UnitInterval, Within
from lit_rl.source import source_of
from lit_rl.trees import space_leaves

log = logging.getLogger(__name__)

ADVICE = {
    "entropy": (
        "The policy has all but stopped exploring: policy/entropy={value:.3g}, {share:.2g} of what random actions "
        "have. If returns are not good yet, raise entropy_coef or lower lr; if they are, nothing is wrong."
    ),
    "kl": (
        "The policy changes too much at once: policy/kl={value:.3g}, more than {limit:g}. The batch no longer "
        "tells what the new policy meets, and returns may fall. Lower lr, take fewer num_epochs, or set target_kl."
    ),
    "explained_variance": (
        "The critic predicts worse than a constant: value/explained_variance={value:.3g}. The policy learns from "
        "noise. Set normalize_returns, raise value_coef, or see if observations tell what the return depends on."
    ),
    "skipped": (
        "{value:.0f} gradient steps were skipped because a loss or gradient was not finite. Lower lr, set "
        "max_grad_norm, and look for huge rewards or observations; the first such batch was saved."
    ),
    "returns": (
        "Training returns have not moved: rollout/return_mean has stayed between {low:.6g} and {high:.6g} for "
        "{steps:,} env steps. If that is not the best there is, the policy never meets a reward: explore more "
        "(entropy_coef, or DQN's epsilon), or make the reward denser."
    ),
}


class Diagnostics(TakesOptions, L.Callback):
    """Says in plain words what looks wrong, what it means and what to try: once, and again only after it recovered.

    Looks at the metrics of docs/metrics.md, at their median over the last `window` batches; what an algorithm does not
    log is not looked at. Warnings change nothing else, and come from the first learner process.

    Args:
        window: Lightning batches that a median is taken over.
        min_entropy: `policy/entropy` as a share of what random actions have, below which exploration has collapsed. For
            bounded continuous actions the share of the range that is still tried; not looked at for unbounded ones.
        max_kl: `policy/kl` above which the policy changes too fast, nats.
        min_explained_variance: `value/explained_variance` below which the critic is worse than useless. Looked at while
            training returns are behind their best: once all episodes are alike it is low for good reason.
        still_share: of `max_env_steps`, after which `rollout/return_mean` must have moved, by 1 % of its size. Without
            a budget it is not looked at.
    """

    window: int
    min_entropy: float
    max_kl: float
    min_explained_variance: float
    still_share: float

    def __init__(
        self,
        *,
        window: Count = 20,
        min_entropy: UnitInterval = 0.01,
        max_kl: Positive = 0.1,
        min_explained_variance: Annotated[float, Within(high=1.0)] = 0.0,
        still_share: UnitInterval = 0.25,
    ):
        super().__init__()
        self.take_options()
        self._recent: dict[str, deque[float]] = {}
        self._wrong: set[str] = set()
        self._lowest, self._highest = math.inf, -math.inf  # training return of the run

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and not trainer.ckpt_path:
            self._recent.clear()
            self._wrong.clear()
            self._lowest, self._highest = math.inf, -math.inf

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        value = metrics.get("rollout/return_mean", math.nan)
        if math.isfinite(value):
            self._lowest, self._highest = min(self._lowest, value), max(self._highest, value)
        found = {
            "entropy": self._entropy(metrics, pl_module),
            "kl": self._kl(metrics),
            "explained_variance": self._explained_variance(metrics),
            "skipped": self._skipped(metrics),
            "returns": self._returns(metrics, pl_module),
        }
        for kind, numbers in found.items():
            if numbers is None:
                self._wrong.discard(kind)
            elif kind not in self._wrong:
                self._wrong.add(kind)
                if trainer.is_global_zero:
                    clock = source_of(trainer).clock.replace("_", " ")
                    log.warning("After %d %s: %s", pl_module.clock, clock, ADVICE[kind].format(**numbers))

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "wrong": sorted(self._wrong), "returns": [self._lowest, self._highest]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._recent = {name: deque(values, self.window) for name, values in state_dict["recent"].items()}
        self._wrong = set(state_dict["wrong"])
        self._lowest, self._highest = state_dict["returns"]

    # What each finds: the numbers of its sentence, or None where nothing is wrong.

    def _entropy(self, metrics: Mapping[str, float], algorithm: Any) -> dict[str, float] | None:
        value = self._median(metrics, "policy/entropy")
        if value is None:
            return None
        squashed = isinstance(getattr(algorithm.policy, "distribution", None), SquashedGaussian)
        share = entropy_share(algorithm.spec.action_space, value, squashed)
        return {"value": value, "share": share} if share is not None and share < self.min_entropy else None

    def _kl(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        value = self._median(metrics, "policy/kl")
        return {"value": value, "limit": self.max_kl} if value is not None and value > self.max_kl else None

    def _explained_variance(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        value, return_mean = self._median(metrics, "value/explained_variance"), metrics.get("rollout/return_mean")
        # Rounded: where all returns are equal, a critic that is as good as can be says a constant.
        if value is None or return_mean is None or round(value, 2) >= self.min_explained_variance:
            return None
        span = self._highest - self._lowest
        behind = span > 0 and self._highest - return_mean >= 0.1 * span
        return {"value": value} if behind else None

    def _skipped(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        totals = self._recent.setdefault("optim/skipped_updates", deque([0.0], self.window))
        totals.append(metrics.get("optim/skipped_updates", 0.0))
        return {"value": totals[-1] - totals[0]} if totals[-1] > totals[0] else None

    def _returns(self, metrics: Mapping[str, float], algorithm: Any) -> dict[str, float] | None:
        budget, steps = algorithm.budget, algorithm.env_steps_done
        enough = self._median(metrics, "rollout/return_mean") is not None
        if budget is None or not enough or steps < self.still_share * budget:
            return None
        if self._highest - self._lowest > 0.01 * max(abs(self._lowest), abs(self._highest)):
            return None
        return {"low": self._lowest, "high": self._highest, "steps": steps}

    def _median(self, metrics: Mapping[str, float], name: str) -> float | None:
        """Of the last `window` batches; None before there are so many, and of what is not logged."""
        values = self._recent.setdefault(name, deque(maxlen=self.window))
        if math.isfinite(metrics.get(name, math.nan)):
            values.append(metrics[name])
        return float(np.median(values)) if len(values) == self.window else None


def entropy_share(space: gym.Space, entropy: float, squashed: bool = False) -> float | None:
    """How much of random actions' freedom a policy's entropy (nats) leaves; None for spaces without such a measure.

    Of discrete actions, the share of the uniform distribution's entropy. Of bounded continuous ones, the width of a
    uniform distribution of that entropy as a share of the range, in the mean over dimensions.

    Args:
        space: of the actions.
        entropy: `policy/entropy`.
        squashed: the entropy is that of actions in [-1, 1].

    >>> entropy_share(spaces.Box(0.0, 10.0), 0.0)
    0.1
    """
    parts = space_leaves(space).values()
    if all(isinstance(part, spaces.Box) for part in parts):
        boxes: list[Any] = list(parts)
        widths = np.concatenate([np.ravel(box.high.astype(float) - box.low.astype(float)) for box in boxes])
        if not np.isfinite(widths).all() or (widths <= 0).any():
            return None
        if squashed:
            widths = np.full_like(widths, 2.0)
        return round(float(np.exp(entropy / len(widths) - np.log(widths).mean())), 12)
    counts: list[float] = []
    for part in parts:
        if isinstance(part, spaces.Discrete):
            counts.append(float(part.n))
        elif isinstance(part, spaces.MultiDiscrete):
            counts += part.nvec.ravel().tolist()
        elif isinstance(part, spaces.MultiBinary):
            counts += [2.0] * int(np.prod(part.shape))
        else:
            return None  # continuous and discrete actions together
    most = float(np.log(counts).sum())
    return entropy / most if most > 0 else None
