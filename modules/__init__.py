"""The algorithms, one file each."""

from lit_rl.modules.appo import APPO
from lit_rl.modules.dqn import DQN, Rainbow
from lit_rl.modules.dreamer_v3 import DreamerV3
from lit_rl.modules.impala import IMPALA
from lit_rl.modules.ppo import PPO
from lit_rl.modules.sac import SAC, TQC

__all__ = ["APPO", "DQN", "IMPALA", "PPO", "SAC", "TQC", "DreamerV3", "Rainbow"]
