"""Games of a checkpoint's policy against random legal actions: how many it wins, draws and loses.

    .venv/bin/python benchmarks/games.py last.ckpt --env pettingzoo.classic.tictactoe_v3 --agent player_1 --games 500
    .venv/bin/python benchmarks/games.py last.ckpt --policy red --agent "red_*" --against "blue_*" \\
        --script fox=lit_rl.envs.coins:Fox

A shared policy that plays both sides has a mean return of 0 whatever it has learned, so `eval/return_mean` says
nothing of it. Here one agent, or those of a pattern, act by the policy, greedily unless `--stochastic`, and all others
at random but those that have a script. A game is won if the return of these agents is above 0, or above that of the
agents `--against`, and lost if it is below. Actions that an `action_mask` forbids are counted.
"""

import argparse
import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from lit_rl import Policy, Random, load_policy
from lit_rl.envs.entry_points import entry_point
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv, MultiAgentWrapper
from lit_rl.envs.pettingzoo import adapted
from lit_rl.evaluation.episodes import play
from lit_rl.masks import ACTION_MASK
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing.playing import environment_of, episode_seeds


class Match(NamedTuple):
    """Who plays.

    Attributes:
        agent: who acts by the policy, an entry of `possible_agents` or a pattern of some.
        policy: which one, of a checkpoint that holds several.
        against: a pattern of the agents whose return theirs is compared to; None compares it to 0.
        scripts: "package.module:Class" of what acts for others, by pattern; nothing acts at random.
    """

    agent: str
    policy: str | None = None
    against: str | None = None
    scripts: dict[str, str] = {}


class Games(NamedTuple):
    """What came of some games.

    Attributes:
        returns: of each game the agents', summed, less those they are compared to.
        illegal: actions that its mask forbade, in all games.
    """

    returns: Sequence[float]
    illegal: int

    @property
    def counts(self) -> dict[str, int]:
        """How many games were won, drawn and lost, and how many actions were illegal."""
        signs = np.sign(self.returns)
        found = {name: int((signs == sign).sum()) for name, sign in (("won", 1), ("drawn", 0), ("lost", -1))}
        return found | {"illegal": self.illegal}


class CountIllegal(MultiAgentWrapper):
    """Calls `count` for each action of some agents that the mask in their observation forbids.

    Args:
        env: the environment inside.
        agent: whose actions, a pattern.
        count: what is called.
    """

    def __init__(self, env: MultiAgentEnv, agent: str, count: Any):
        super().__init__(env)
        self._agent, self._count, self._masks = agent, count, dict[str, np.ndarray]()

    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        if fnmatchcase(agent, self._agent) and isinstance(obs, dict) and ACTION_MASK in obs:
            self._masks[agent] = np.array(obs[ACTION_MASK])
        return obs

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        for agent, action in actions.items():
            if agent in self._masks and not self._masks[agent][action]:
                self._count()
        return super().step(actions)


def play_games(
    env: EnvConfig, policy: Policy, match: Match, seeds: Sequence[int], *, deterministic: bool = True
) -> Games:
    """Have agents play a game for each seed by `policy`, against others that act at random.

    Args:
        env: the environment, of several agents.
        policy: the agents'.
        match: who plays.
        seeds: one for each game.
        deterministic: the most probable action, or a random one.

    Raises:
        ValueError: if there is no such agent.
    """
    spec = env.try_out()
    names = list(spec.agents) if isinstance(spec, MultiAgentSpec) else []
    for option, pattern in (("agent", match.agent), ("against", match.against)):
        if pattern is not None and not fnmatch.filter(names, pattern):
            raise ValueError(f"--{option} {pattern}: env={env.env_id} has the agents {names}.")
    assert isinstance(spec, MultiAgentSpec)
    illegal: list[None] = []

    def counting(made: Any) -> MultiAgentEnv:
        return CountIllegal(adapted(made), match.agent, lambda: illegal.append(None))

    policies: dict[str, Any] = {"player": policy, "random": Random()}
    mapping = {match.agent: "player"}
    for pattern, name in match.scripts.items():
        policies[pattern], mapping[pattern] = _made(name), pattern
    players = PolicySet(spec, policies, mapping | {"*": "random"}).eval()
    players.rng = np.random.default_rng(seeds)
    episodes = play(replace(env, wrappers=(*env.wrappers, counting)), players, seeds, deterministic=deterministic)
    returns = []
    for episode in episodes:
        assert episode.returns is not None
        own, other = (
            sum(x for agent, x in episode.returns.items() if pattern is not None and fnmatchcase(agent, pattern))
            for pattern in (match.agent, match.against)
        )
        returns.append(own - other)
    return Games(returns, len(illegal))


def _made(name: str) -> Any:
    """An object of "package.module:Class"."""
    made = entry_point(name)
    if made is None:
        raise ValueError(f"--script {name}: expected package.module:Class.")
    return made()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--agent", required=True, help="who acts by the policy: an agent, or a pattern of some")
    parser.add_argument("--policy", help="which one, if the checkpoint holds several")
    parser.add_argument("--against", help="a pattern of the agents whose return theirs is compared to, instead of 0")
    parser.add_argument("--script", nargs="+", default=[], metavar="PATTERN=MODULE:CLASS", help="what acts for others")
    parser.add_argument("--games", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the games and of the random actions")
    parser.add_argument("--stochastic", action="store_true", help="draw actions instead of the most probable ones")
    parser.add_argument("--env", help="in place of the checkpoint's environment")
    args = parser.parse_args()
    scripts = dict(each.split("=", 1) for each in args.script)
    match = Match(args.agent, args.policy, args.against, scripts)
    for path in args.checkpoints:
        env, policy = environment_of(path, args.env), load_policy(path, policy=args.policy)
        seeds = episode_seeds(args.seed, args.games)
        games = play_games(env, policy, match, seeds, deterministic=not args.stochastic)
        print(f"{path}: " + ", ".join(f"{name} {count}" for name, count in games.counts.items()), flush=True)


if __name__ == "__main__":
    main()
