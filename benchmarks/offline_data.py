"""Data sets of recorded episodes, which the recipes of offline algorithms learn from.

    .venv/bin/python benchmarks/offline_data.py

Trains PPO on CartPole-v1 and SAC on Pendulum-v1, as `ppo_cartpole` and `sac_pendulum` do, and records episodes of what
they were at several times into `runs/data/<name>`. A data set that is there is left as it is. The data are not
committed; `docs/results/offline_data.json` has each file's SHA-256, the rows, and a histogram of the returns.

    cartpole_expert   50 episodes of the trained policy, sampled
    cartpole_medium   150 episodes of a policy whose return is 150 to 250, sampled
    cartpole_mixed    25 % of the rows are the trained policy's, sampled, 75 % those of one whose return is 40 to 75,
                      greedy
    pendulum_expert   50 episodes of the trained policy, greedy
    pendulum_mixed    the episodes of SAC's training, of its first 10,000 env steps, exploration included

By `--sets halfcheetah_medium` alone, since it takes half an hour and needs lit-rl[mujoco]:

    halfcheetah_medium   200 episodes (200,000 rows) of the first policy of SAC on HalfCheetah-v5, trained as
                         `sac_halfcheetah` is, that has a greedy return of 4,000, sampled
"""

import argparse
import functools
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import numpy as np

from lit_rl import MLP, PPO, SAC, Algorithm, Evaluation, Record, ReplayDataModule, RolloutDataModule, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.files.episodes import read_manifest

ROOT = Path(__file__).resolve().parent.parent
SEED = 7  # none of those that recipes are judged by
EXPERT_STEPS = {"CartPole-v1": 100_000, "Pendulum-v1": 15_000}
SETS = ("cartpole_expert", "cartpole_medium", "cartpole_mixed", "pendulum_expert", "pendulum_mixed")
MEDIUM = 4_000.0  # return of HalfCheetah-v5; trained to the end it is 6,300
EXPLORED = 10_000  # env steps of SAC's training that are recorded


class Stages(L.Callback):
    """Saves a checkpoint at the end of every epoch, named by its env steps."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Algorithm) -> None:
        trainer.save_checkpoint(self.folder / f"{pl_module.env_steps_done:07d}.ckpt")


class UntilGood(Stages):
    """Ends training at the first checkpoint of return `MEDIUM`."""

    found: Path | None = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Algorithm) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        newest = max(self.folder.glob("*.ckpt"))
        if mean_return("HalfCheetah-v5", newest, deterministic=True, episodes=5) >= MEDIUM:
            self.found = newest
            trainer.should_stop = True


def make_trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def train_ppo(folder: Path, steps: int, rollout_length: int = 128) -> None:
    """PPO on CartPole-v1 as in recipes/ppo_cartpole.yaml, with a checkpoint after every rollout."""
    L.seed_everything(SEED, verbose=False)
    algorithm = PPO(
        lr=1e-3, lr_schedule="linear", num_epochs=10, minibatch_size=256, entropy_coef=0.0, normalize_returns=False
    )
    data = RolloutDataModule(
        "CartPole-v1",
        num_envs_per_env_runner=8,
        rollout_length=rollout_length,
        rollouts_per_epoch=1,
        max_env_steps=steps,
    )
    make_trainer(Stages(folder)).fit(algorithm, data)


def train_sac(folder: Path, steps: int, *callbacks: L.Callback, batches_per_epoch: int = 10) -> None:
    """SAC on Pendulum-v1 as in recipes/sac_pendulum.yaml, with a checkpoint after every epoch of 500-step batches."""
    L.seed_everything(SEED, verbose=False)
    network = functools.partial(MLP, hidden_sizes=[128, 128], activation="relu")
    algorithm = SAC(lr=1e-3, network=network, critic_hidden_sizes=[128, 128])
    data = ReplayDataModule(
        "Pendulum-v1", max_env_steps=steps, buffer_size=25_000, batch_size=256, learning_starts=500,
        env_steps_per_batch=500, batches_per_epoch=batches_per_epoch,
    )  # fmt: skip
    make_trainer(Stages(folder), *callbacks).fit(algorithm, data)


def train_cheetah(folder: Path) -> Path:
    """SAC on HalfCheetah-v5 as in recipes/sac_halfcheetah.yaml, to its first checkpoint of return `MEDIUM`."""
    L.seed_everything(SEED, verbose=False)
    data = ReplayDataModule(
        "HalfCheetah-v5", max_env_steps=150_000, buffer_size=1_000_000, batch_size=256, learning_starts=5_000,
        env_steps_per_batch=1_000, batches_per_epoch=5, checkpoint_buffer=False,
    )  # fmt: skip
    stages = UntilGood(folder)
    make_trainer(stages).fit(SAC(lr=3e-4, gamma=0.99, tau=0.005, compile=True), data)
    if stages.found is None:
        raise SystemExit(f"HalfCheetah-v5: no checkpoint has a return of {MEDIUM}.")
    return stages.found


def mean_return(env: str, checkpoint: Path, deterministic: bool, episodes: int = 100) -> float:
    seeds = np.random.SeedSequence(SEED).generate_state(episodes).tolist()
    policy = load_policy(checkpoint)
    return float(np.mean([e.return_ for e in play(EnvConfig(env), policy, seeds, deterministic=deterministic)]))


def first_between(env: str, folder: Path, low: float, high: float, deterministic: bool) -> Path:
    """The first checkpoint whose return lies between two numbers."""
    for path in sorted(folder.glob("*.ckpt")):
        if low <= mean_return(env, path, deterministic) <= high:
            return path
    raise SystemExit(f"{env}: no checkpoint has a return between {low} and {high}.")


def record(env: str, checkpoint: Path, out: Path, episodes: int, deterministic: bool) -> None:
    """Record episodes of a checkpoint's policy."""
    evaluation = Evaluation(episodes=episodes, deterministic=deterministic)
    kind = PPO if env == "CartPole-v1" else SAC
    data = RolloutDataModule(env, seed=SEED, evaluation=evaluation)
    make_trainer(Record(out)).predict(kind.load_from_checkpoint(checkpoint), data)


def rows_of(folder: Path) -> int:
    manifest = read_manifest(folder)
    return 0 if manifest is None else manifest["rows"]


def make(folder: Path, sets: Sequence[str] = SETS) -> Iterator[str]:
    """Make the data sets that are missing; yields the name of each."""
    with tempfile.TemporaryDirectory() as scratch:
        ppo, early, sac, explored, cheetah = (Path(scratch) / x for x in ("ppo", "early", "sac", "explored", "cheetah"))
        for stages in (ppo, early, sac, explored, cheetah):
            stages.mkdir()

        def expert(env: str) -> Path:
            stages = ppo if env == "CartPole-v1" else sac
            if not list(stages.iterdir()):
                train = train_ppo if env == "CartPole-v1" else train_sac
                train(stages, EXPERT_STEPS[env])
            return max(stages.glob("*.ckpt"))

        for name in sets:
            out = folder / name
            if (out / "_manifest.json").exists():
                yield name
                continue
            shutil.rmtree(out, ignore_errors=True)
            if name == "cartpole_expert":
                record("CartPole-v1", expert("CartPole-v1"), out, 50, deterministic=False)
            elif name == "cartpole_medium":
                expert("CartPole-v1")
                medium = first_between("CartPole-v1", ppo, 150, 250, deterministic=False)
                record("CartPole-v1", medium, out, 150, deterministic=False)
            elif name == "cartpole_mixed":
                record("CartPole-v1", expert("CartPole-v1"), out, 25, deterministic=False)
                train_ppo(early, 2_048, rollout_length=32)
                poor = first_between("CartPole-v1", early, 40, 75, deterministic=True)
                steps = mean_return("CartPole-v1", poor, deterministic=True, episodes=200)
                record("CartPole-v1", poor, out, round(3 * rows_of(out) / steps), deterministic=True)
            elif name == "pendulum_expert":
                record("Pendulum-v1", expert("Pendulum-v1"), out, 50, deterministic=True)
            elif name == "halfcheetah_medium":
                record("HalfCheetah-v5", train_cheetah(cheetah), out, 200, deterministic=False)
            else:
                train_sac(explored, EXPLORED, Record(out, training=True, evaluation=False))
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "data")
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "halfcheetah_medium"], default=list(SETS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)  # before training, not after
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    out = ROOT / "docs" / "results" / "offline_data.json"
    found = json.loads(out.read_text())["sets"] if out.exists() else {}
    for name in make(args.folder, args.sets):
        manifest = read_manifest(args.folder / name)
        assert manifest is not None
        found[name] = manifest
        print(f"{name}: {manifest['rows']} rows, {manifest['episodes']} episodes", flush=True)
    out.write_text(
        json.dumps({"command": ".venv/bin/python benchmarks/offline_data.py", "sets": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
