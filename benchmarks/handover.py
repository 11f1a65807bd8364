"""What a run gains, or loses, that goes on online from a policy learned from recorded episodes.

    .venv/bin/python benchmarks/handover.py ppo
    .venv/bin/python benchmarks/handover.py sac

`ppo`: BC on 150 episodes of a policy whose return on CartPole-v1 is 150 to 250, then PPO from it, beside PPO from
scratch as `ppo_cartpole` has it. From BC the bound of the ratio is small at first: BC has no critic, and the one that
begins anew would mislead a policy that is good already. Counted are the env steps until the mean return of 20 greedy
episodes, played every 2,048 steps, is 475.

`sac`: `iql_pendulum`, then SAC's critics alone by the recorded data (`critic_warmup`), since IQL's say little of
actions that nobody recorded, then SAC online from both. Counted is how much of the return is lost after 1,000, 2,000
and 5,000 env steps, as a share of the gap between random actions and the policy that IQL learned: greedy, on 100 start
states that are always the same.

The data are made by `benchmarks/offline_data.py`. PPO's settings were chosen on seeds 11 to 13, SAC's
on seed 11. Writes
`docs/results/handover_ppo.json` and `handover_sac.json`.
"""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from measuring import quiet_trainer, write
from results import commit, play_randomly, train

from lit_rl import BC, MLP, PPO, SAC, OfflineDataModule, ReplayDataModule, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play

GOAL, EVERY, MOST_STEPS = 475.0, 2_048, 100_000  # of CartPole-v1
BC_UPDATES = 5_000
BC_OPTIONS: dict[str, Any] = {"lr": 1e-3, "lr_schedule": "linear"}
PPO_OPTIONS: dict[str, Any] = {  # as in recipes/ppo_cartpole.yaml
    "lr": 1e-3, "lr_schedule": "linear", "num_epochs": 10, "minibatch_size": 256, "normalize_returns": False,
}  # fmt: skip
FROM_BC: dict[str, Any] = {"clip_schedule": [[0, 0.02], [2_048, 0.2]]}
JUDGED, ONLINE_STEPS = (1_000, 2_000, 5_000), 5_000  # of Pendulum-v1
LOSS = 0.05  # the greatest share of the gap that may be lost
CRITIC_UPDATES = 6_000  # by the recorded data, before the first env step
SAC_OPTIONS: dict[str, Any] = {"lr": 1e-3, "actor_lr": 3e-4, "initial_alpha": 0.05}
SAC_DATA: dict[str, Any] = {
    "batch_size": 256, "buffer_size": 10_000, "learning_starts": 256, "random_warmup": False,
    "offline_paths": "runs/data/pendulum_mixed", "offline_fraction": 0.5,
}  # fmt: skip


class Curve(L.Callback):
    """Greedy returns before the first step and at the end of each epoch, on start states that stay the same.

    Args:
        env: the environment's id.
        seeds: of the episodes.
        goal: the run ends when the mean return is this.

    Attributes:
        points: env steps and the mean return.
    """

    def __init__(self, env: str, seeds: Sequence[int], goal: float = float("inf")):
        self._env, self._seeds, self._goal = EnvConfig(env), seeds, goal
        self.points: list[tuple[int, float]] = []

    def on_train_start(self, trainer: L.Trainer, algorithm: Any) -> None:
        self._play(trainer, algorithm)

    def on_train_epoch_end(self, trainer: L.Trainer, algorithm: Any) -> None:
        self._play(trainer, algorithm)

    def _play(self, trainer: L.Trainer, algorithm: Any) -> None:
        found = float(np.mean([episode.return_ for episode in play(self._env, algorithm.policy, self._seeds)]))
        self.points.append((algorithm.env_steps_done, round(found, 3)))
        trainer.should_stop |= found >= self._goal


def start_states(seed: int, num: int) -> list[int]:
    """Seeds of episodes that no run has seen."""
    return np.random.SeedSequence([seed, 20_000]).generate_state(num).tolist()


# --- BC, then PPO ---------------------------------------------------------------------------------------------------


def imitate(seed: int, path: Path) -> None:
    """Write a checkpoint of BC on the medium data."""
    L.seed_everything(seed, verbose=False)
    trainer = quiet_trainer()
    data = OfflineDataModule("runs/data/cartpole_medium", max_updates=BC_UPDATES, torch_threads=1)
    trainer.fit(BC(**BC_OPTIONS), data)
    trainer.save_checkpoint(path)


def ppo_curve(seed: int, init_from: Path | None = None) -> list[tuple[int, float]]:
    """PPO's greedy returns until the goal is reached."""
    L.seed_everything(seed, verbose=False)
    curve = Curve("CartPole-v1", start_states(seed, 20), GOAL)
    algorithm = PPO(**PPO_OPTIONS, **({} if init_from is None else FROM_BC))
    if init_from is not None:
        algorithm.init_from = str(init_from)
    rows, length = 8, 128
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=rows, rollout_length=length, rollouts_per_epoch=EVERY // (rows * length),
        max_env_steps=MOST_STEPS, torch_threads=1,
    )  # fmt: skip
    quiet_trainer(curve).fit(algorithm, data)
    return curve.points


def to_goal(points: Sequence[tuple[int, float]]) -> int | None:
    """Env steps until the goal; None where it is not reached."""
    return next((steps for steps, found in points if steps and found >= GOAL), None)


def compare_ppo(seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    runs = []
    for seed in seeds:
        checkpoint = folder / f"bc_cartpole_medium_{seed}.ckpt"
        if not checkpoint.exists():
            imitate(seed, checkpoint)
        curves = {"from_bc": ppo_curve(seed, checkpoint), "from_scratch": ppo_curve(seed)}
        runs.append(
            {
                "seed": seed,
                **{f"env_steps_{name}": to_goal(points) for name, points in curves.items()},
                "curves": curves,
            }
        )
        print({name: value for name, value in runs[-1].items() if name != "curves"}, flush=True)
    medians = {
        name: statistics.median(run[name] or float("inf") for run in runs)
        for name in ("env_steps_from_bc", "env_steps_from_scratch")
    }
    ratio = medians["env_steps_from_bc"] / medians["env_steps_from_scratch"]
    return {"medians": medians, "ratio": round(ratio, 3), "bar": 0.6, "runs": runs}


# --- IQL, then SAC --------------------------------------------------------------------------------------------------


def make_sac(init_from: Path, **options: Any) -> SAC:
    network = functools.partial(MLP, hidden_sizes=[128, 128], activation="relu")
    algorithm = SAC(network=network, critic_hidden_sizes=[128, 128], **SAC_OPTIONS, **options)
    algorithm.init_from = str(init_from)
    return algorithm


def learn_critics(seed: int, init_from: Path, path: Path) -> None:
    """Write a checkpoint of SAC with the policy of `iql_pendulum` and critics that learned what it is worth."""
    L.seed_everything(seed, verbose=False)
    trainer = quiet_trainer()
    data = OfflineDataModule(
        SAC_DATA["offline_paths"], max_updates=CRITIC_UPDATES, batch_size=SAC_DATA["batch_size"], torch_threads=1
    )
    trainer.fit(make_sac(init_from, critic_warmup=CRITIC_UPDATES), data)
    trainer.save_checkpoint(path)


def sac_curve(seed: int, init_from: Path) -> list[tuple[int, float]]:
    """SAC's greedy returns from a checkpoint of `learn_critics`."""
    L.seed_everything(seed, verbose=False)
    curve = Curve("Pendulum-v1", start_states(seed, 100))
    data = ReplayDataModule(
        "Pendulum-v1", max_env_steps=ONLINE_STEPS, env_steps_per_batch=1_000, batches_per_epoch=1, torch_threads=1,
        **SAC_DATA,
    )  # fmt: skip
    quiet_trainer(curve).fit(make_sac(init_from), data)
    return curve.points


def sac_run(seed: int, folder: Path, random: float) -> dict[str, Any]:
    """What SAC loses of what IQL learned, on the way."""
    checkpoint = folder / "iql_pendulum" / f"seed_{seed}" / "version_0" / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        train("iql_pendulum", seed, folder / "iql_pendulum")
    critics = folder / f"critics_{seed}.ckpt"
    if not critics.exists():
        learn_critics(seed, checkpoint, critics)
    points = sac_curve(seed, critics)
    offline = points[0][1]
    lost = {str(steps): round((offline - found) / (offline - random), 4) for steps, found in points[1:]}
    return {"seed": seed, "offline": offline, "lost": lost, "commit": commit(), "curve": points}


def compare_sac(seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    random, runs = play_randomly(EnvConfig("Pendulum-v1"))["return_mean"], []
    for seed in seeds:
        kept = folder / f"sac_{seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(sac_run(seed, folder, random)))
        runs.append(json.loads(kept.read_text()))
        print({name: value for name, value in runs[-1].items() if name != "curve"}, flush=True)
    losses = [run["lost"] for run in runs]
    return {
        "random": random,
        "judged_after": JUDGED,
        "greatest_loss": max(lost[str(steps)] for lost in losses for steps in JUDGED),
        "greatest_loss_at_any_time": max(max(lost.values()) for lost in losses),
        "bar": LOSS,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ppo", "sac"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoints and SAC's runs here, and use those that are there"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.what == "ppo":
            found, of = compare_ppo(args.seeds, folder), {"bc": BC_OPTIONS, "ppo": PPO_OPTIONS, "from_bc": FROM_BC}
        else:
            found, of = compare_sac(args.seeds, folder), {"sac": SAC_OPTIONS, "data": SAC_DATA}
    write(f"handover_{args.what}.json", {"settings": of} | found)


if __name__ == "__main__":
    main()
