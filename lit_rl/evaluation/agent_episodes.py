"""Plays whole episodes of an environment of several agents: what evaluation does."""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from lit_rl.envs.copies import Copies, Events, Outcome, returns_by_name
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError
from lit_rl.policy import Policy
from lit_rl.runners.acting import actions_of, observations, sample
from lit_rl.runners.fragment import Episode


def play_agents(
    env: EnvConfig,
    policy: Policy,
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    info_metrics: Sequence[str] = (),
    num_envs: int = 16,
    timeout_s: float | None = None,
) -> Iterator[Episode]:
    """`play`, where every agent acts by the same policy. An episode's return is the sum over its agents.

    Args:
        env, policy, seeds, deterministic, num_envs, timeout_s: see `lit_rl.evaluation.episodes.play`.
        info_metrics: keys of `info[agent]` to report for each episode.

    Raises:
        EnvError: if the environment raises, or gives what it must not give.
    """
    num_envs = min(num_envs, len(seeds))
    if not num_envs:
        return
    copies, started = Copies(env, num_envs, info_metrics), time.monotonic()
    try:
        remaining = [list(seeds[b::num_envs]) for b in range(num_envs)]
        seed_of = [queue.pop(0) for queue in remaining]
        left, events = len(seeds), Events()
        state = policy.initial_state(copies.num_slots)
        is_init = np.ones(copies.num_slots, np.bool_)
        for b, seed in enumerate(seed_of):
            copies.begin(b, seed, events)
        while True:
            is_init[events.again] = False
            is_init[events.begun] = True
            asked = copies.asked()
            actions = iter(())
            if asked:
                slots = np.array([one.slot for one in asked])
                obs = observations(policy, asked, copies.roster.num_slots)
                recorded, _, _ = sample(
                    policy, obs, state, slots, is_init[slots], lambda x, y: policy.step(x, y, deterministic)
                )  # fmt: skip
                actions = actions_of(policy, recorded)
            events = copies.step(actions)
            for outcome in events.over:
                left -= 1
                yield _episode(env, copies, outcome, seed_of[outcome.copy])
                if remaining[outcome.copy]:
                    seed_of[outcome.copy] = remaining[outcome.copy].pop(0)
                    copies.begin(outcome.copy, seed_of[outcome.copy], events)
            if not left:
                return
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                for b in range(num_envs):
                    outcome = copies.outcome(b)
                    if copies.has_agents(b) and outcome.length:
                        yield _episode(env, copies, outcome, seed_of[b], cut=True)
                return
    finally:
        copies.close()


def _episode(env: EnvConfig, copies: Copies, outcome: Outcome, seed: int, *, cut: bool = False) -> Episode:
    returns = returns_by_name(copies.roster, outcome.returns)
    total = math.fsum(outcome.returns.values())
    if not all(map(math.isfinite, chain([total], returns.values()))):
        raise EnvError(
            f"env={env.env_id}: a reward of the evaluation episode with seed {seed} is not finite, its returns are "
            f"{returns}. Mend the environment."
        )
    return Episode(total, outcome.length, outcome.info, seed=seed, cut=cut, returns=returns)
