"""What policies of waterworld are worth: random actions, lit_rl's checkpoints, and RLlib's two examples.

PettingZoo 1.25 is the last version that has waterworld, and it needs pymunk 6. RLlib needs packages that lit_rl does
not: see async_speed.py.

    pip install --target ../waterworld --no-deps pettingzoo==1.25.0 'pymunk<7'
    export PYTHONPATH=../waterworld
    .venv/bin/python benchmarks/waterworld.py --checkpoint runs/.../last.ckpt
    .venv/bin/python benchmarks/waterworld.py --rllib shared independent --rllib-python ../rllib/bin/python

Two pursuers look for food and avoid poison: `pettingzoo.sisl.waterworld_v4` with `n_pursuers=2`, in episodes of 500 env
steps. Returns are sums over both, as `eval/return_mean` is. Intervals are 95 % ones of the mean. All play the same
episodes, whose seeds `--seed` makes, and act greedily; a checkpoint does so behind the wrappers that it was trained
with.

`--rllib` trains with the options of RLlib's rllib/examples/multi_agent/pettingzoo_parameter_sharing.py ("shared") and
pettingzoo_independent_learning.py ("independent"). Those are its PPO's but for `vf_loss_coeff=0.005`, with 2 env
runners of one environment each. Both take the environment in turns, so that an env step is the action of one agent:
500k of them, after which the examples expect a return of 0, are 250k env steps of lit_rl, in which both act.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

AGENTS = ("pursuer_0", "pursuer_1")
ENV, ENV_KWARGS = "pettingzoo.sisl.waterworld_v4", {"n_pursuers": len(AGENTS)}
POLICIES = {"shared": dict.fromkeys(AGENTS, "p0"), "independent": {agent: agent for agent in AGENTS}}  # of RLlib


def rllib(name: str, env_steps: int, seed: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Train as an example of RLlib does, and play an episode for each of `seeds`."""
    import ray
    import torch
    from pettingzoo.sisl import waterworld_v4
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.env.wrappers.pettingzoo_env import PettingZooEnv
    from ray.tune.registry import register_env

    policy_of = POLICIES[name]
    policies = set(policy_of.values())
    register_env("env", lambda _: PettingZooEnv(waterworld_v4.env(**ENV_KWARGS)))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .environment("env")
        .multi_agent(policies=policies, policy_mapping_fn=lambda agent, *_, **__: policy_of[agent])
        .training(vf_loss_coeff=0.005)
        .env_runners(sample_timeout_s=600.0)  # a busy machine is no reason to learn from fewer steps
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs={policy: RLModuleSpec() for policy in policies}))
        .debugging(seed=seed)
    )
    if name == "shared":
        config.training(model={"vf_share_layers": True})  # of no effect any more, but it is what the example has
    else:
        config.rl_module(model_config=DefaultModelConfig(vf_share_layers=True))
    algorithm = config.build_algo()
    begun, done = time.perf_counter(), 0
    while done < env_steps:
        result = algorithm.train()["env_runners"]
        done = int(result["num_env_steps_sampled_lifetime"])
        mean = result.get("episode_return_mean", float("nan"))
        print(f"{done} env steps, {time.perf_counter() - begun:.0f} s: return {mean:.2f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begun
    modules = {agent: algorithm.get_module(policy_id) for agent, policy_id in policy_of.items()}

    def act(agent: str, obs: np.ndarray) -> np.ndarray:
        module = modules[agent]
        with torch.no_grad():
            found = module.forward_inference({"obs": torch.from_numpy(obs)[None]})
        chosen = module.get_inference_action_dist_cls().from_logits(found["action_dist_inputs"]).to_deterministic()
        return chosen.sample()[0].numpy().clip(-1, 1)  # as RLlib's own connector does for such a space

    returns = episode_returns(waterworld_v4.parallel_env(**ENV_KWARGS), act, seeds)
    algorithm.stop()
    return {"returns": returns, "env_steps": done, "seconds": round(seconds, 1)}


def episode_returns(env: Any, act: Callable[[str, Any], Any], seeds: Sequence[int]) -> list[float]:
    """The return, summed over the agents, of an episode of a parallel environment of PettingZoo for each seed."""
    returns = []
    for seed in seeds:
        obs, _ = env.reset(seed=int(seed))
        total = 0.0
        while env.agents:
            obs, reward, *_ = env.step({agent: act(agent, obs[agent]) for agent in env.agents})
            total += float(sum(reward.values()))
        returns.append(total)
    return returns


def in_its_process(python: str, *arguments: Any) -> dict[str, Any]:
    """What `rllib` returns, in a process of its own, with one torch thread; what it says on the way is shown."""
    command = [python, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if result is None:
        sys.exit(f"RLlib, {arguments[0]} failed.")
    return json.loads(result.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=[])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes and of the random actions")
    parser.add_argument("--rllib", nargs="+", choices=list(POLICIES), default=[], help="train RLlib's examples")
    parser.add_argument("--rllib-python", default=sys.executable, help="interpreter that has ray[rllib]")
    parser.add_argument("--rllib-env-steps", type=int, default=500_000, help="as RLlib counts them")
    parser.add_argument("--rllib-seed", type=int, default=0, help="of its training")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, env_steps, seed, seeds = args.one
        found = rllib(name, int(env_steps), int(seed), json.loads(seeds))
        print("RESULT " + json.dumps(found), flush=True)
        return
    from agent_returns import checkpoint_returns, env_steps_per_s, line, returns_of

    from lit_rl import Random
    from lit_rl.envs.make import EnvConfig
    from lit_rl.viewing.playing import episode_seeds

    env, seeds = EnvConfig(ENV, ENV_KWARGS), episode_seeds(args.seed, args.episodes)
    print(f"{ENV} by itself: {env_steps_per_s(env, 3.0):,.0f} env steps/s", flush=True)
    print(line("random actions", returns_of(env, Random(), seeds), len(AGENTS)), flush=True)
    for path in args.checkpoint:
        print(line(path, checkpoint_returns(path, ENV, ENV_KWARGS, seeds), len(AGENTS)), flush=True)
    for name in args.rllib:
        found = in_its_process(args.rllib_python, name, args.rllib_env_steps, args.rllib_seed, json.dumps(seeds))
        speed = found["env_steps"] / found["seconds"]
        print(f"{line(f'RLlib, {name}', found['returns'], len(AGENTS))}, {speed:.0f} env steps/s", flush=True)


if __name__ == "__main__":
    main()
