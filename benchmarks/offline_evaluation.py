"""Which estimator of `lit-rl evaluate` ranks policies as they are: ten of known quality on CartPole and on Pendulum.

    .venv/bin/python benchmarks/offline_evaluation.py

Trains PPO on CartPole-v1 and SAC on Pendulum-v1, as `offline_data.py` does, and takes ten checkpoints of each, from
early to late. Their true discounted return is the mean of 200 episodes (100 on Pendulum), with actions that are drawn
for what importance sampling judges, greedy ones for `FQE (greedy)`. The data are `cartpole_medium` and
`pendulum_mixed` of `offline_data.py`, which has to run before. Writes `docs/results/offline_evaluation.json`: for each
policy the truth and every estimate; for each estimator Spearman's rank correlation with the truth, the regret@1 (what
the truth of the policy it likes best lacks to the best one's), the mean absolute error, and for how many policies it
warns. Checkpoints and what was found of each stay in `--folder`: a run that was broken off goes on where it was.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write
from offline_data import train_ppo, train_sac

from lit_rl import Policy, evaluate_offline, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play

ROOT = Path(__file__).resolve().parent.parent
GAMMA, NUM_POLICIES, SEED = 0.99, 10, 11
SETS = {"CartPole-v1": ("cartpole_medium", 100_000, 200), "Pendulum-v1": ("pendulum_mixed", 5_500, 100)}


def checkpoints(env: str, folder: Path, steps: int) -> list[Path]:
    """Ten checkpoints of a training, in the order of time; early ones are closer together."""
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if env == "CartPole-v1":
            train_ppo(folder, steps)
        else:
            train_sac(folder, steps, batches_per_epoch=1)
        (folder / "whole").touch()
    found = sorted(folder.glob("*.ckpt"))
    at = np.linspace(0, 1, NUM_POLICIES) ** 2 * (len(found) - 1)
    rising = np.maximum(at.round().astype(int), np.arange(NUM_POLICIES))
    return [found[i] for i in rising]


def true_value(env: str, policy: Policy, episodes: int, deterministic: bool) -> float:
    """The mean discounted return of episodes that are played."""
    seeds = np.random.SeedSequence(SEED).generate_state(episodes).tolist()
    policy.rng = np.random.default_rng(SEED)
    rewards = [
        episode.steps["reward"]
        for episode in play(EnvConfig(env), policy, seeds, deterministic=deterministic, record=True)
        if episode.steps is not None
    ]
    return float(np.mean([np.sum(reward * GAMMA ** np.arange(len(reward))) for reward in rewards]))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; what is no number ranks lowest."""
    ranks = [np.argsort(np.argsort(np.nan_to_num(each, nan=-np.inf))) for each in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def evaluated(env: str, path: Path, data: Path, episodes: int) -> dict[str, Any]:
    """What a checkpoint's policy is worth, and what the estimators say, which is kept beside it."""
    kept = path.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    policy, begun = load_policy(path), time.process_time()
    truth = {form: true_value(env, policy, episodes, form == "greedy") for form in ("sampled", "greedy")}
    result = evaluate_offline(policy, data, gamma=GAMMA, num_refits=2)
    estimates = {each.name: {"value": each.value, "warning": each.warning} for each in result.estimates}
    found = {"env_steps": int(path.stem), "true": truth, "estimates": estimates, "data": result.data.value}
    kept.write_text(json.dumps(found | {"cpu_s": round(time.process_time() - begun, 1)}))
    return evaluated(env, path, data, episodes)


def judge(estimates: list[dict[str, Any]], truth: np.ndarray) -> dict[str, Any]:
    """How well the estimates of one estimator for several policies agree with the truth."""
    values = np.array([each["value"] for each in estimates])
    best = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    return {
        "rank_correlation": round(rank_correlation(values, truth), 3),
        "regret_at_1": round(float(truth.max() - truth[best]), 2),
        "mean_absolute_error": round(float(np.abs(values - truth).mean()), 2),
        "warnings": sum(each["warning"] is not None for each in estimates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "offline_evaluation")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "data")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for env, (name, steps, episodes) in SETS.items():
        policies = []
        for path in checkpoints(env, args.folder / env, steps):
            policies.append(evaluated(env, path, args.data / name, episodes))
            said = {estimator: round(each["value"], 2) for estimator, each in policies[-1]["estimates"].items()}
            print(f"{env} {path.stem}: {policies[-1]['true']}, {said}, {policies[-1]['cpu_s']} s", flush=True)
        truth = {form: np.array([each["true"][form] for each in policies]) for form in ("sampled", "greedy")}
        estimators = {
            estimator: judge(
                [each["estimates"][estimator] for each in policies],
                truth["greedy" if "greedy" in estimator else "sampled"],
            )
            for estimator in policies[0]["estimates"]
        }
        found[env] = {"data": name, "value": policies[0]["data"], "estimators": estimators, "policies": policies}
        for estimator, each in estimators.items():
            print(f"{env} {estimator}: {each}", flush=True)
    write("offline_evaluation.json", {"gamma": GAMMA, "sets": found})


if __name__ == "__main__":
    main()
