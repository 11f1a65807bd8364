"""How much of simple_spread a policy has learned, between random actions (0 %) and a written controller (100 %).

    .venv/bin/python benchmarks/spread.py --episodes 200 --checkpoint runs/.../last.ckpt

Three agents are to cover three landmarks: `mpe2.simple_spread_v3` with N=3, max_cycles=25, local_ratio=0.5 and discrete
actions. Returns are sums over the agents, as `eval/return_mean` is. Intervals are 95 % ones of the mean. All play the
same episodes, whose seeds `--seed` makes; a checkpoint acts greedily, behind the wrappers that it was trained with.
"""

import argparse
import itertools

import numpy as np
from agent_returns import checkpoint_returns, env_steps_per_s, line, returns_of

from lit_rl import Random
from lit_rl.envs.make import EnvConfig
from lit_rl.viewing.playing import episode_seeds

NUM_AGENTS = 3
ENV, ENV_KWARGS = "mpe2.simple_spread_v3", {"N": NUM_AGENTS, "max_cycles": 25, "local_ratio": 0.5}
# Of mpe2: a step moves an agent by 0.1 of its velocity, of which three quarters are left, and a push is added.
TIME_STEP, KEPT = 0.1, 0.75
PUSHES = 0.5 * np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])  # by action
PLANS = np.array(list(itertools.product(range(5), range(5), range(5), [0])))  # all of three actions, [125, 4]


class Controller:
    """Each agent goes to the landmark that is its own in the assignment with the least total distance.

    It tries out all plans of three actions, by the physics of one agent alone, and begins the one that has it nearest
    to the landmark over four steps. What it sees, [18]: its velocity and place, then where the landmarks and the other
    agents are from it.
    """

    def act(self, obs: np.ndarray) -> int:
        landmarks, others = obs[4:10].reshape(3, 2), obs[10:14].reshape(2, 2)
        agents = np.concatenate([np.zeros((1, 2)), others])
        distance = np.linalg.norm(agents[:, None] - landmarks, axis=-1)
        own = min(itertools.permutations(range(3)), key=lambda order: distance[range(3), order].sum())[0]
        place, velocity, cost = np.zeros((len(PLANS), 2)), np.tile(obs[:2], (len(PLANS), 1)), np.zeros(len(PLANS))
        for actions in PLANS.T:
            place += velocity * TIME_STEP
            velocity = velocity * KEPT + PUSHES[actions]
            cost += np.linalg.norm(place - landmarks[own], axis=-1)
        return int(PLANS[cost.argmin(), 0])


def percent(returns: np.ndarray, random: np.ndarray, controller: np.ndarray) -> float:
    """Where the mean of some returns is between random actions and the controller."""
    return float(100 * (returns.mean() - random.mean()) / (controller.mean() - random.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=[])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes and of the random actions")
    args = parser.parse_args()
    env, seeds = EnvConfig(ENV, ENV_KWARGS), episode_seeds(args.seed, args.episodes)
    print(f"{ENV} by itself: {env_steps_per_s(env, 1.0):,.0f} env steps/s", flush=True)
    random, controller = returns_of(env, Random(), seeds), returns_of(env, Controller(), seeds)
    print(line("random actions", random, NUM_AGENTS), flush=True)
    print(line("controller", controller, NUM_AGENTS), flush=True)
    for path in args.checkpoint:
        returns = checkpoint_returns(path, ENV, ENV_KWARGS, seeds)
        print(f"{line(path, returns, NUM_AGENTS)}: {percent(returns, random, controller):.1f} %", flush=True)


if __name__ == "__main__":
    main()
