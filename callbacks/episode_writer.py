"""Writes the episodes that `predict` plays."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.files import rescue


class EpisodeWriter(BasePredictionWriter):
    """Writes each rank's episodes to `episodes-rank<r>.parquet`, one row per env step.

    Columns: `episode, t, agent, observation, action, reward, terminated, truncated, log_prob, policy_version`; parts of
    Dict and Tuple spaces have columns of their own, named by path as in `observation/arm`. The action is the one the
    environment was given; `log_prob` is 0 where the policy had no choice (deterministic). The file's metadata holds the
    environment's spec as JSON under the key `lit_rl`.

    Args:
        folder: where to; None for the logger's folder.
    """

    def __init__(self, folder: str | None = None):
        super().__init__(write_interval="epoch")
        self._folder = folder

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(self._folder or rescue.log_folder(trainer))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"episodes-rank{trainer.global_rank}.parquet"
        played = [episode for episode in predictions if episode and episode["steps"]]
        tables = [
            _table(pa, trainer.global_rank + i * trainer.world_size, episode["steps"], int(pl_module.updates))
            for i, episode in enumerate(played)
        ]
        if not tables:
            return
        metadata = {"lit_rl": json.dumps({"format": 1, "spec": pl_module.spec.to_dict()})}
        pq.write_table(pa.concat_tables(tables).replace_schema_metadata(metadata), path)
        returns = [episode["return_"] for episode in played]
        rank_zero_info(f"{len(returns)} episodes, mean return {np.mean(returns):.6g}: {path}")


def _table(pa: Any, episode: int, steps: dict[str, np.ndarray], version: int) -> Any:
    length = len(steps["reward"])
    nested = {name: _column(pa, array) for name, array in steps.items() if name.startswith(("observation", "action"))}
    log_prob = nested.pop("action_log_prob")
    return pa.table(
        {
            "episode": np.full(length, episode),
            "t": np.arange(length),
            "agent": pa.array(["agent_0"] * length),
            **nested,
            "reward": steps["reward"].astype(np.float64),
            "terminated": steps["terminated"],
            "truncated": steps["truncated"],
            "log_prob": log_prob,
            "policy_version": np.full(length, version),
        }
    )


def _column(pa: Any, array: np.ndarray) -> Any:
    """Scalars as they are; arrays as flat lists of fixed size (the spec has their shape)."""
    if array.ndim == 1:
        return pa.array(array)
    flat = array.reshape(len(array), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
