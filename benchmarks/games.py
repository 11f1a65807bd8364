"""Games of a checkpoint's policy against random legal actions: how many it wins, draws and loses.

    .venv/bin/python benchmarks/games.py last.ckpt --env pettingzoo.classic.tictactoe_v3 --agent player_1 --games 500

A shared policy that plays both sides has a mean return of 0 whatever it has learned, so `eval/return_mean` says
nothing of it. Here one agent acts by the policy, greedily unless `--stochastic`, and all others at random. A game is
won if the agent's return is above 0, and lost if it is below. Actions that an `action_mask` forbids are counted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lit_rl import Policy, Random, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.envs.multi_agent import MultiAgentEnv, MultiAgentWrapper
from lit_rl.envs.pettingzoo import adapted
from lit_rl.evaluation.episodes import play
from lit_rl.masks import ACTION_MASK
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing.playing import environment_of, episode_seeds


class Games(NamedTuple):
    """What came of some games.

    Attributes:
        returns: the agent's, of each game.
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
    """Calls `count` for each action of one agent that the mask in its observation forbids.

    Args:
        env: the environment inside.
        agent: whose actions.
        count: what is called.
    """

    def __init__(self, env: MultiAgentEnv, agent: str, count: Any):
        super().__init__(env)
        self._agent, self._count, self._mask = agent, count, None

    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        if agent == self._agent:
            self._mask = np.array(obs[ACTION_MASK])
        return obs

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        action = actions.get(self._agent)
        if action is not None and self._mask is not None and not self._mask[action]:
            self._count()
        return super().step(actions)


def play_games(
    env: EnvConfig, policy: Policy, agent: str, seeds: Sequence[int], *, deterministic: bool = True
) -> Games:
    """Have `agent` play a game for each seed by `policy`, against agents that act at random.

    Args:
        env: the environment, of several agents.
        policy: the agent's.
        agent: an entry of `possible_agents`.
        seeds: one for each game.
        deterministic: the most probable action, or a random one.

    Raises:
        ValueError: if there is no such agent.
    """
    spec = env.try_out()
    if not isinstance(spec, MultiAgentSpec) or agent not in spec.agents:
        names = list(spec.agents) if isinstance(spec, MultiAgentSpec) else []
        raise ValueError(f"--agent {agent}: env={env.env_id} has the agents {names}.")
    illegal: list[None] = []

    def counting(made: Any) -> MultiAgentEnv:
        return CountIllegal(adapted(made), agent, lambda: illegal.append(None))

    players = PolicySet(spec, {"player": policy, "random": Random()}, {agent: "player", "*": "random"}).eval()
    players.rng = np.random.default_rng(seeds)
    episodes = play(replace(env, wrappers=(*env.wrappers, counting)), players, seeds, deterministic=deterministic)
    return Games([episode.returns[agent] for episode in episodes if episode.returns], len(illegal))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--agent", required=True, help="who acts by the policy")
    parser.add_argument("--policy", help="which one, if the checkpoint holds several")
    parser.add_argument("--games", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the games and of the random actions")
    parser.add_argument("--stochastic", action="store_true", help="draw actions instead of the most probable ones")
    parser.add_argument("--env", help="in place of the checkpoint's environment")
    args = parser.parse_args()
    for path in args.checkpoints:
        env, policy = environment_of(path, args.env), load_policy(path, policy=args.policy)
        seeds = episode_seeds(args.seed, args.games)
        games = play_games(env, policy, args.agent, seeds, deterministic=not args.stochastic)
        print(f"{path}: " + ", ".join(f"{name} {count}" for name, count in games.counts.items()), flush=True)


if __name__ == "__main__":
    main()
