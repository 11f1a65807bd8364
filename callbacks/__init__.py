"""Optional behaviour of a run."""

from lit_rl.callbacks.diagnostics import Diagnostics
from lit_rl.callbacks.offline_evaluation import OfflineEvaluation
from lit_rl.callbacks.predictions import Predictions
from lit_rl.callbacks.progress import EnvStepsProgressBar
from lit_rl.callbacks.record import EpisodeWriter, Record
from lit_rl.callbacks.scale import ScaleEnvRunners
from lit_rl.callbacks.video import Video

__all__ = [
    "Diagnostics",
    "EnvStepsProgressBar",
    "EpisodeWriter",
    "OfflineEvaluation",
    "Predictions",
    "Record",
    "ScaleEnvRunners",
    "Video",
]
