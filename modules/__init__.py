"""The algorithms, one file each."""

from lit_rl.modules.appo import APPO
from lit_rl.modules.bc import BC
from lit_rl.modules.cql import CQL, DiscreteCQL
from lit_rl.modules.dqn import DQN, Rainbow
from lit_rl.modules.dreamer_v3 import DreamerV3
from lit_rl.modules.impala import IMPALA
from lit_rl.modules.iql import IQL
from lit_rl.modules.marwil import MARWIL
from lit_rl.modules.ppo import PPO
from lit_rl.modules.sac import SAC, TQC

__all__ = [
    "APPO", "BC", "CQL", "DQN", "IMPALA", "IQL", "MARWIL", "PPO", "SAC", "TQC", "DiscreteCQL", "DreamerV3", "Rainbow",
]  # fmt: skip
