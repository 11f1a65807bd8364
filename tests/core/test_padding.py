"""Rows that are padding count in no mean, and ranks count by their real rows."""

import numpy as np
import pytest
import torch
from envs import CounterEnv

from lit_rl import PPO, distributed
from lit_rl.algorithm import Update
from lit_rl.envs.make import EnvConfig
from lit_rl.policy import Policy
from lit_rl.rollout import mean_of_rows, means_of_rows
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.gathering import padded, to_rollout


def test_policy_lag_leaves_out_environments_that_are_padding(monkeypatch) -> None:
    config = EnvConfig(CounterEnv)
    runner = EnvRunner(config, Policy(config.spec()), num_envs=1, rollout_length=4, seed=np.random.SeedSequence(0))
    runner.set_version(1000)
    rollout = padded(to_rollout([runner.sample()], copy=False), 2, masked=True)
    rollout.env_steps = 4
    algorithm = PPO(spec=config.spec().to_dict())
    algorithm.updates.fill_(1000)
    monkeypatch.setattr(algorithm, "checked_update", lambda batch: Update({}))
    assert algorithm.learn_from(rollout) == {"rollout/policy_lag": 0.0}  # before: 500


@pytest.mark.parametrize(
    ("masks", "mean"),
    [
        ([[True, True], [True, True]], 3.75),  # of 1, 2, 4, 8
        ([[True, True], [True, False]], 7 / 3),  # before: 2.75
        ([[True, True], [False, False]], 1.5),  # before: 0.75, by a rank that has no rows
        ([[False, True], [False, False]], 2.0),  # of half a row per rank
    ],
)
def test_the_average_over_ranks_is_the_mean_over_all_their_real_rows(monkeypatch, masks, mean) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    values, masks = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor(masks)
    row_count = (masks.sum() / 2).expand(2)  # what gradient_step asks the ranks for
    batches = [{"mask": mask, "row_count": row_count} for mask in masks]
    logged = [means_of_rows(batch, value, -value) for batch, value in zip(batches, values)]
    assert (sum(logged) / 2).tolist() == pytest.approx([mean, -mean])
    assert float(sum(mean_of_rows(value, batch) for batch, value in zip(batches, values)) / 2) == pytest.approx(mean)


def test_one_process_divides_by_its_own_real_rows() -> None:
    mask = torch.tensor([True, False, True])
    assert means_of_rows({"mask": mask}, torch.tensor([1.0, 50.0, 2.0])).tolist() == [1.5]
    assert means_of_rows({}, torch.tensor([1.0, 50.0, 3.0])).tolist() == [18.0]
