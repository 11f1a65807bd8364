"""Whole episodes that say how good a policy is."""

from lit_rl.evaluation.options import Evaluation

__all__ = ["Evaluation"]
