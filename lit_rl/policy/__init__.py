"""What acts: shipped to env runners, loaded for inference. Light, since an env runner's process imports it."""

from lit_rl.policy.base import POLICIES, Policy, State, built_in, class_name
from lit_rl.policy.q import QPolicy

__all__ = ["POLICIES", "Policy", "QPolicy", "State", "built_in", "class_name"]
