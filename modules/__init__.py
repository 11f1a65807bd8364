"""The algorithms, one file each."""

from lit_rl.modules.dqn import DQN, Rainbow
from lit_rl.modules.ppo import PPO
from lit_rl.modules.sac import SAC, TQC

__all__ = ["DQN", "PPO", "SAC", "TQC", "Rainbow"]
