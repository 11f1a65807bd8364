"""What acts: shipped to env runners, loaded for inference. Light, since an env runner's process imports it."""

from lit_rl.policy.base import POLICIES, Policy, State, built_in, class_name
from lit_rl.policy.latent import LatentPolicy
from lit_rl.policy.mapping import EpisodeInfo
from lit_rl.policy.policy_set import PolicySet
from lit_rl.policy.q import QPolicy
from lit_rl.policy.scripted import Random

__all__ = [
    "POLICIES",
    "EpisodeInfo",
    "LatentPolicy",
    "Policy",
    "PolicySet",
    "QPolicy",
    "Random",
    "State",
    "built_in",
    "class_name",
]
