"""Records episodes in files, from which can be learned offline."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.errors import DataError, OptionError
from lit_rl.files import rescue
from lit_rl.files.episode_folder import EpisodeFolder, TimeLine, WholeEpisode
from lit_rl.options import Count, Folder, TakesOptions
from lit_rl.runners.assembling import Assembled, Assembler
from lit_rl.runners.fragment import Episode
from lit_rl.spec import MultiAgentSpec
from lit_rl.trees import iterate, nest, row_converter

log = logging.getLogger(__name__)
MAX_BYTES = 64 * 2**20  # of episodes that wait to be written


class Record(TakesOptions, L.Callback):
    """Writes whole episodes into Parquet files, as `OfflineDataModule` reads them: see `lit_rl.files.episodes`.

    Records evaluation's episodes while the Trainer fits, validates or tests, those of env runners if asked, and all
    that `Trainer.predict` plays. Those that are under way when the run ends are counted, and not written. A file is
    written once it is full, with each checkpoint, and at the end. One that cannot be written costs its episodes and a
    warning; in `predict` it is an error.

    A folder that has episodes gets more. One that it already has, since the run was resumed or begun anew with the same
    seed, is not written twice.

    Args:
        folder: where to; None for `episodes` in the run's folder.
        every: of training's episodes, and of evaluation's, the first and every so many after it are recorded.
        training: record the episodes of env runners. Their rewards are the environment's, before `reward_scale` and
            `reward_clip`.
        evaluation: record the episodes of evaluations.
        rows_per_file: steps and final observations after which a file is written.

    Raises:
        OptionError: when made, if an option cannot be; before training, if the datamodule has nothing to record, or
            training's episodes are of several agents.
    """

    folder: str | Path | None
    every: int
    training: bool
    evaluation: bool
    rows_per_file: int

    def __init__(
        self,
        folder: Folder | None = None,
        *,
        every: Count = 1,
        training: bool = False,
        evaluation: bool = True,
        rows_per_file: Count = 100_000,
    ):
        super().__init__()
        self.take_options()
        self._trainer: L.Trainer | None = None  # while something is recorded
        self._assembler = Assembler(every)
        self._begun = {"training": 0, "evaluation": 0}  # episodes so far, also of the run that is gone on with
        self._waiting: list[WholeEpisode] = []
        self._num_rows = self._num_bytes = 0

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._end()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun | {"training": self._assembler.begun}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._begun = dict(state_dict["begun"])

    # --- the run ------------------------------------------------------------------------------------------------

    def _begin(self, trainer: L.Trainer, algorithm: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "evaluator"):
            raise OptionError("Record: expected a datamodule with an environment, such as RolloutDataModule.")
        records_training = self.training and trainer.state.fn == "fit"
        if records_training and not hasattr(data, "fragment_watcher"):
            raise OptionError(f"Record(training=True): {type(data).__name__} has no env runners. Leave it out.")
        if records_training and isinstance(data.spec, MultiAgentSpec):
            raise OptionError(
                f"Record(training=True): env={data.spec.env_id} has several agents, whose episodes are recorded in "
                "evaluation and predict alone. Leave it out."
            )
        self._trainer, self._algorithm, self._data = trainer, algorithm, data
        self._is_predict = trainer.state.fn == "predict"
        path = Path(self.folder) if self.folder is not None else rescue.log_folder(trainer) / "episodes"
        self._folder = EpisodeFolder(path, data.spec, data.describe_env(), trainer.global_rank)
        self._assembler = Assembler(self.every)
        self._assembler.begun = self._begun["training"]
        self._returns: list[float] = []
        self._unfinished = self._known = 0
        if self.evaluation or self._is_predict:
            data.evaluator.recorder = self._take_played
        if records_training:
            data.fragment_watcher = self._take_fragments

    def _end(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is None:
            return
        self._data.evaluator.recorder = None
        if hasattr(self._data, "fragment_watcher"):
            self._data.fragment_watcher = None
        self._write()
        self._begun["training"] = self._assembler.begun
        mean = f", mean return {np.mean(self._returns):.6g}" if self._returns else ""
        unfinished = self._unfinished + self._assembler.under_way + self._assembler.broken
        said = f"Recorded {len(self._returns)} episodes{mean}: {self._folder.path}"
        said += f". {unfinished} had not ended and were not recorded" if unfinished else ""
        said += f". {self._known} of them were there before" if self._known else ""
        rank_zero_info(said)

    def _take_played(self, episode: Episode) -> None:
        """An episode was played for evaluation."""
        trainer, data = self._trainer, self._data
        if trainer is None or trainer.sanity_checking:
            return
        self._begun["evaluation"] += 1
        if not self._is_predict and (self._begun["evaluation"] - 1) % self.every:
            return
        if episode.cut:
            self._unfinished += 1
            return
        found = episode.agent_steps or [("agent_0", episode.steps or {})]
        greedy, version = data.evaluation.deterministic, episode.policy_version or 0
        lines = [_played(steps, greedy, version, agent) for agent, steps in found]
        self._keep(WholeEpisode(lines, ("evaluation", int(episode.seed or 0), version)))

    def _take_fragments(self, fragments: Any, step: int) -> None:
        """Env runners collected fragments."""
        for found in self._assembler.add(fragments, step):
            line = self._as_given(found)
            rank = self._data.attached_trainer.global_rank
            self._keep(WholeEpisode([line], ("training", int(self._data.seed), rank, *found.origin)))

    def _as_given(self, found: Assembled) -> TimeLine:
        """An episode with its actions as the environment was given them."""
        policy = self._algorithm.policy
        space = policy.spec.action_space
        action = nest({name: x for name, x in found.steps.items() if name.partition("/")[0] == "action"})["action"]
        given = row_converter(space)(policy.to_env(action))
        steps = found.steps | dict(iterate(given, "action"))
        return TimeLine(steps, found.final, False, steps.pop("policy_version"))

    def _keep(self, episode: WholeEpisode) -> None:
        self._waiting.append(episode)
        self._num_rows += sum(len(line) + 1 for line in episode.lines)
        self._num_bytes += episode.num_bytes
        if self._num_rows >= self.rows_per_file or self._num_bytes >= MAX_BYTES:
            self._write()

    def _write(self) -> None:
        """Write the episodes that wait."""
        waiting, self._waiting = self._waiting, []
        self._num_rows = self._num_bytes = 0
        if not waiting:
            return
        try:
            written = self._folder.add(waiting)
        except DataError as error:
            if self._is_predict:
                raise
            log.warning("%d episodes are not recorded: %s", len(waiting), error)
            return
        self._known += len(waiting) - written
        self._returns += [episode.return_ for episode in waiting]


class EpisodeWriter(L.Callback):
    """The name that `Record` once had."""

    def __init__(self, folder: str | None = None):
        raise OptionError("EpisodeWriter is called Record now: lit_rl.Record(folder).")


def _played(steps: Mapping[str, np.ndarray], greedy: bool, version: int, agent: str) -> TimeLine:
    """What an agent did in an episode that was played."""
    final = {name.removeprefix("final_"): x for name, x in steps.items() if name.startswith("final_")}
    kept = {name: x for name, x in steps.items() if not name.startswith("final_") and name != "action_log_prob"}
    return TimeLine(kept | {"log_prob": steps["action_log_prob"]}, final, greedy, version, agent)
