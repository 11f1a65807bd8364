"""Optional behaviour of a run."""

from lit_rl.callbacks.episode_writer import EpisodeWriter
from lit_rl.callbacks.progress import EnvStepsProgressBar
from lit_rl.callbacks.scale import ScaleEnvRunners

__all__ = ["EnvStepsProgressBar", "EpisodeWriter", "ScaleEnvRunners"]
