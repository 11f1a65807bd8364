"""Plays whole episodes of an environment of several agents: what evaluation does."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lit_rl.envs.copies import Copies, Events
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError
from lit_rl.policy import Policy, PolicySet
from lit_rl.runners.cast import Cast, Choice, Group
from lit_rl.runners.fragment import Episode
from lit_rl.runners.multi_agent_runner import episode_of


class Watcher(Protocol):
    """Who is told what happens in episodes as they are played. It takes in events in the place of the cast."""

    def begin(self, policy: Policy | PolicySet, cast: Cast, copies: Copies) -> None:
        """Watch what these do."""

    def act(self, group: Group, choice: Choice | None, actions: Sequence[Any]) -> None:
        """What agents of one policy do, as the environment takes it; `choice` is None if a script acts."""

    def step(self, events: Events) -> None:
        """What an env step brought. `cast.take` is to be called with it."""

    def take(self, events: Events) -> None:
        """Who acts next, after resets perhaps. `cast.take` is to be called with it."""


def play_agents(
    env: EnvConfig,
    policy: Policy | PolicySet,
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    info_metrics: Sequence[str] = (),
    num_envs: int = 16,
    timeout_s: float | None = None,
    watcher: Watcher | None = None,
) -> Iterator[Episode]:
    """`play`, where there are several agents, and one policy for all of them or several.

    An episode's return is the sum over its agents.

    Args:
        env, policy, seeds, deterministic, num_envs, timeout_s: see `lit_rl.evaluation.episodes.play`.
        info_metrics: keys of `info[agent]` to report for each episode.
        watcher: is told what happens; of an episode all of it before that is yielded.

    Raises:
        EnvError: if the environment raises, or gives what it must not give.
    """

    def choose(one: Policy) -> Any:
        return lambda obs, state: one.step(obs, state, deterministic)

    num_envs = min(num_envs, len(seeds))
    if not num_envs:
        return
    copies, started = Copies(env, num_envs, info_metrics), time.monotonic()
    try:
        cast = Cast(policy, copies)
        take = cast.take
        if watcher is not None:
            watcher.begin(policy, cast, copies)
            take = watcher.take
        remaining = [list(seeds[b::num_envs]) for b in range(num_envs)]
        seed_of = [queue.pop(0) for queue in remaining]
        left, events = len(seeds), Events()
        for b, seed in enumerate(seed_of):
            cast.begin(b, seed)
            copies.begin(b, seed, events)
        while True:
            take(events)
            actions: list[Any] = [None] * sum(len(group.asked) for group in cast.groups)
            for group, choice, chosen in cast.act(choose):
                of_group = list(chosen)
                if watcher is not None:
                    watcher.act(group, choice, of_group)
                for place, action in zip(group.places, of_group):
                    actions[place] = action
            events = copies.step(iter(actions))
            over = events.over
            if watcher is not None:
                watcher.step(events)
                events = Events()
            for outcome in over:
                left -= 1
                b = outcome.copy
                yield _finite(env, episode_of(copies, cast, outcome, seed=seed_of[b]))
                if remaining[b]:
                    seed_of[b] = remaining[b].pop(0)
                    cast.begin(b, seed_of[b])
                    copies.begin(b, seed_of[b], events)
            if not left:
                return
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                for b in range(num_envs):
                    outcome = copies.outcome(b)
                    if copies.has_agents(b) and outcome.length:
                        yield _finite(env, episode_of(copies, cast, outcome, seed=seed_of[b], cut=True))
                return
    finally:
        copies.close()


def _finite(env: EnvConfig, episode: Episode) -> Episode:
    if not all(map(math.isfinite, [episode.return_, *(episode.returns or {}).values()])):
        raise EnvError(
            f"env={env.env_id}: a reward of the evaluation episode with seed {episode.seed} is not finite, its returns "
            f"are {episode.returns}. Mend the environment."
        )
    return episode
