"""The algorithms, one file each."""

from lit_rl.modules.ppo import PPO

__all__ = ["PPO"]
