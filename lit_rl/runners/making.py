"""A learner process makes its env runners, and lets them go on from a checkpoint's."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.envs.make import EnvConfig
from lit_rl.policy import Policy
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.maker import RunnerMaker
from lit_rl.runners.placement import Placement
from lit_rl.runners.pool import LocalPool, Pool
from lit_rl.runners.ray_pool import RunnerPool

log = logging.getLogger(__name__)


def make_pool(
    env: EnvConfig,
    make_policy: Callable[[], Policy],
    *,
    num_env_runners: int,
    num_envs: int,
    rollout_length: int,
    seed: np.random.SeedSequence,
    rank: int,
    world_size: int,
    collected: int,
    ledger: Ledger,
    faults: FaultTolerance,
    placement: Placement,
    saved: list[dict[str, Any]] | None,
    info_metrics: Sequence[str],
    keep_states: bool | Collection[str],
    reward_scale: float,
    reward_clip: float | None,
) -> Pool:
    """This rank's env runners.

    Args:
        env: how to make the environments.
        make_policy: makes a policy of the learner's structure, in the runner's process.
        num_env_runners: Ray actors, of a Ray that is connected; 0: one runner in this process.
        ledger: where env steps are written down.
        placement: of Ray actors.
        saved: the states of the runners in the checkpoint from which the run is resumed; None if it is not.
        num_envs, seed, rank, world_size, collected: see `RunnerMaker`.
        rollout_length, faults, info_metrics, keep_states, reward_scale, reward_clip: see `EnvRunner`.
    """
    make_runner = RunnerMaker(
        env,
        make_policy,
        num_envs=num_envs,
        rollout_length=rollout_length,
        seed=seed,
        rank=rank,
        world_size=world_size,
        collected=collected,
        faults=faults,
        info_metrics=info_metrics,
        keep_states=keep_states,
        is_multi_agent=env.is_multi_agent,
        replayable=not num_env_runners,
        reward_scale=reward_scale,
        reward_clip=reward_clip,
    )
    if saved is not None and collected and (num_env_runners or not saved):
        rank_zero_info("Resumed: episodes and action noise begin afresh, as they do after a run with env runners.")
    if num_env_runners:
        return RunnerPool(make_runner, num_env_runners, ledger, faults, placement)
    pool = LocalPool(make_runner, ledger)
    if saved:
        _go_on(pool, saved, env, num_envs)
    return pool


def _go_on(pool: LocalPool, saved: list[dict[str, Any]], env: EnvConfig, num_envs: int) -> None:
    """Go on from a checkpoint's episodes, and tell how many of them cannot."""
    restarted = pool.set_state(saved)
    before = len(saved[0].get("begins", saved[0].get("copies", ()))) or num_envs
    if restarted and before != num_envs:
        log.warning(
            "Resumed: all %d episodes begin afresh, since the checkpoint is of %d environments.", num_envs, before
        )
    elif restarted:
        log.warning(
            "Resumed: %d of the %d episodes under way begin afresh, since their environment (env=%s, "
            "vectorization=%s) does not come to the same observation again.",
            restarted,
            num_envs,
            env.env_id,
            env.vectorization,
        )
