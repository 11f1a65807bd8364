"""What an algorithm needs of its surroundings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_rl.learner.steps import GradientSteps
from lit_rl.source import Source


@dataclass(frozen=True)
class Host:
    """What an algorithm needs of its surroundings while it learns, be it the Trainer's module or a part of it.

    Lightning's hooks make one (`Algorithm.host`); a module of several algorithms makes one for each of them.

    Attributes:
        steps: takes its gradient steps.
        source: where its batches come from.
        is_resumed: whether the run goes on from a checkpoint, instead of counting from 0.
        rank: of this process, from 0.
        save_checkpoint: writes a checkpoint of the run under a name, and returns its path; every rank calls it.
        log_folder: where the run's files are; every rank calls it.
    """

    steps: GradientSteps
    source: Source
    is_resumed: bool
    rank: int
    save_checkpoint: Callable[[str], Path]
    log_folder: Callable[[], Path]
