"""Reinforcement learning as an ordinary PyTorch Lightning program.

Public names are imported on first use, so that `import lit_rl` is light: an env runner's process needs neither
Lightning nor tensordict.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC = {
    "AgentId": "lit_rl.envs.multi_agent",
    "Algorithm": "lit_rl.algorithm",
    "APPO": "lit_rl.modules",
    "BC": "lit_rl.modules",
    "CQL": "lit_rl.modules",
    "Diagnostics": "lit_rl.callbacks",
    "DiscreteCQL": "lit_rl.modules",
    "DQN": "lit_rl.modules",
    "DreamerV3": "lit_rl.modules",
    "EnvRunner": "lit_rl.runners.env_runner",
    "EnvSpec": "lit_rl.spec",
    "EnvStepsProgressBar": "lit_rl.callbacks",
    "Evaluation": "lit_rl.evaluation.options",
    "EpisodeInfo": "lit_rl.policy",
    "evaluate_offline": "lit_rl.evaluation.estimating",
    "FaultTolerance": "lit_rl.runners.faults",
    "GRUNetwork": "lit_rl.networks",
    "IMPALA": "lit_rl.modules",
    "ImpalaResNet": "lit_rl.networks",
    "IQL": "lit_rl.modules",
    "load_policy": "lit_rl.files.loading",
    "LatentPolicy": "lit_rl.policy",
    "LSTMNetwork": "lit_rl.networks",
    "MARWIL": "lit_rl.modules",
    "MLP": "lit_rl.networks",
    "MultiAgent": "lit_rl.multi_agent",
    "MultiAgentEnv": "lit_rl.envs.multi_agent",
    "MultiInput": "lit_rl.networks",
    "NatureCNN": "lit_rl.networks",
    "OfflineDataModule": "lit_rl.datamodules",
    "OfflineEvaluation": "lit_rl.callbacks",
    "Placement": "lit_rl.runners.placement",
    "Policy": "lit_rl.policy",
    "PPO": "lit_rl.modules",
    "Predictions": "lit_rl.callbacks",
    "QPolicy": "lit_rl.policy",
    "Rainbow": "lit_rl.modules",
    "Replay": "lit_rl.replay.options",
    "Random": "lit_rl.policy",
    "Record": "lit_rl.callbacks",
    "ReplayDataModule": "lit_rl.datamodules",
    "RolloutDataModule": "lit_rl.datamodules",
    "SAC": "lit_rl.modules",
    "ScaleEnvRunners": "lit_rl.callbacks",
    "TQC": "lit_rl.modules",
    "Video": "lit_rl.callbacks",
}
_RENAMED = {"EpisodeWriter": "lit_rl.callbacks"}  # says so when it is made
__all__ = [*PUBLIC, "__version__"]

if TYPE_CHECKING:
    from lit_rl.algorithm import Algorithm as Algorithm
    from lit_rl.callbacks import Diagnostics as Diagnostics
    from lit_rl.callbacks import EnvStepsProgressBar as EnvStepsProgressBar
    from lit_rl.callbacks import OfflineEvaluation as OfflineEvaluation
    from lit_rl.callbacks import Predictions as Predictions
    from lit_rl.callbacks import Record as Record
    from lit_rl.callbacks import ScaleEnvRunners as ScaleEnvRunners
    from lit_rl.callbacks import Video as Video
    from lit_rl.datamodules import OfflineDataModule as OfflineDataModule
    from lit_rl.datamodules import ReplayDataModule as ReplayDataModule
    from lit_rl.datamodules import RolloutDataModule as RolloutDataModule
    from lit_rl.envs.multi_agent import AgentId as AgentId
    from lit_rl.envs.multi_agent import MultiAgentEnv as MultiAgentEnv
    from lit_rl.evaluation.estimating import evaluate_offline as evaluate_offline
    from lit_rl.evaluation.options import Evaluation as Evaluation
    from lit_rl.files.loading import load_policy as load_policy
    from lit_rl.modules import APPO as APPO
    from lit_rl.modules import BC as BC
    from lit_rl.modules import CQL as CQL
    from lit_rl.modules import DQN as DQN
    from lit_rl.modules import IMPALA as IMPALA
    from lit_rl.modules import IQL as IQL
    from lit_rl.modules import MARWIL as MARWIL
    from lit_rl.modules import PPO as PPO
    from lit_rl.modules import SAC as SAC
    from lit_rl.modules import TQC as TQC
    from lit_rl.modules import DiscreteCQL as DiscreteCQL
    from lit_rl.modules import DreamerV3 as DreamerV3
    from lit_rl.modules import Rainbow as Rainbow
    from lit_rl.multi_agent import MultiAgent as MultiAgent
    from lit_rl.networks import MLP as MLP
    from lit_rl.networks import GRUNetwork as GRUNetwork
    from lit_rl.networks import ImpalaResNet as ImpalaResNet
    from lit_rl.networks import LSTMNetwork as LSTMNetwork
    from lit_rl.networks import MultiInput as MultiInput
    from lit_rl.networks import NatureCNN as NatureCNN
    from lit_rl.policy import EpisodeInfo as EpisodeInfo
    from lit_rl.policy import LatentPolicy as LatentPolicy
    from lit_rl.policy import Policy as Policy
    from lit_rl.policy import QPolicy as QPolicy
    from lit_rl.policy import Random as Random
    from lit_rl.replay.options import Replay as Replay
    from lit_rl.runners.env_runner import EnvRunner as EnvRunner
    from lit_rl.runners.faults import FaultTolerance as FaultTolerance
    from lit_rl.runners.placement import Placement as Placement
    from lit_rl.spec import EnvSpec as EnvSpec


def __getattr__(name: str) -> Any:
    if name in PUBLIC or name in _RENAMED:
        value = getattr(importlib.import_module((PUBLIC | _RENAMED)[name]), name)
        globals()[name] = value
        return value
    peers = importlib.import_module("lit_rl.peers")
    raise AttributeError(f"module 'lit_rl' has no attribute {name!r}.{peers.hint_on_class(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
