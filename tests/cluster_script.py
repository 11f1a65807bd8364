"""What test_cluster.py runs in processes of its own: `python cluster_script.py <case>`, in a folder to write to,
with RAY_AUTH_MODE=token.

Every "node" is a Ray node on this machine, with processes and resources of its own.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import ray
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import quiet_trainer
from ray.cluster_utils import Cluster

from lit_rl import PPO, Placement, RolloutDataModule, cli
from lit_rl.runners import ray_session

TINY = [
    "fit", "--config", "ppo_cartpole", "--data.max_env_steps", "1024", "--data.rollout_length", "16",
    "--data.num_envs_per_env_runner", "4", "--data.rollouts_per_epoch", "2", "--data.evaluation.episodes", "2",
    "--model.minibatch_size", "32", "--model.num_epochs", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.check_val_every_n_epoch", "1", "--trainer.callbacks+", "cluster_script.Watch",
]  # fmt: skip
# A batch is 128 env steps of two learners, an epoch 256.
DQN = [
    "fit", "--config", "dqn_cartpole", "--data.max_env_steps", "1024", "--data.env_steps_per_batch", "64",
    "--data.batches_per_epoch", "2", "--data.evaluation.episodes", "1", "--data.learning_starts", "256",
    "--trainer.callbacks+", "cluster_script.Watch",
]  # fmt: skip


class Watch(L.Callback):
    """Writes down each rank's env steps and last weights; ends rank 1 once, where a file asks for it."""

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *args: Any) -> None:
        with open(f"steps-{trainer.global_rank}.txt", "a") as file:
            print(int(algorithm.env_steps), file=file)
        ask = Path("kill-at.txt")
        if trainer.global_rank == 1 and ask.exists() and int(algorithm.env_steps) >= int(ask.read_text()):
            ask.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_end(self, trainer: L.Trainer, algorithm: Any) -> None:
        torch.save(algorithm.state_dict(), f"weights-{trainer.global_rank}.pt")


@contextmanager
def cluster_of(*nodes: dict[str, Any]) -> Iterator[Any]:
    """Ray nodes with these resources, the first being the head, to which this process connects."""
    cluster = Cluster(initialize_head=True, head_node_args=nodes[0] | {"include_dashboard": False})
    try:
        for node in nodes[1:]:
            cluster.add_node(**node)
        ray_session.connect(cluster.address)
        Path("session.txt").write_text(cluster.head_node.get_session_dir_path())
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class SlowCartPole(CartPoleEnv):
    """Writes one byte per step to a file of its process."""

    def step(self, action: Any) -> tuple:
        with open(f"{os.environ['STEPS_FOLDER']}/{os.getpid()}", "ab") as file:
            file.write(b".")
        time.sleep(0.001)
        return super().step(action)


class LoseANode(L.Callback):
    """Ends the node of runner 0 with all its processes while a fragment is under way; stops once two runners are back.

    Attributes:
        homes: the node of each runner, before the loss, directly after it, and at the end.
    """

    def __init__(self, cluster: Any, data: RolloutDataModule):
        self.cluster, self.data, self.homes = cluster, data, []

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *args: Any) -> None:
        if algorithm.updates_done == 2:
            self.homes.append(self.now())
        elif algorithm.updates_done == 3:
            (victim,) = (node for node in self.cluster.worker_nodes if node.node_id == self.homes[0][0])
            self.cluster.remove_node(victim, allow_graceful=False)
        elif algorithm.updates_done == 5:
            self.homes.append(self.now())
        elif algorithm.updates_done > 5 and len(now := self.now()) == 2:
            self.homes.append(now)
            trainer.should_stop = True

    def now(self) -> list[str]:
        actors = [slot.actor for slot in self.data._pool._slots if slot.actor is not None and slot.ready is None]
        return ray.get([a.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for a in actors])


def runners_spread_and_a_node_lost() -> None:
    steps = Path(os.environ["STEPS_FOLDER"])
    steps.mkdir()
    with cluster_of({"num_cpus": 0}, *[{"num_cpus": 1, "resources": {"simulator": 2}}] * 2) as cluster:
        data = RolloutDataModule(
            SlowCartPole, num_env_runners=2, num_envs_per_env_runner=2, rollout_length=64, max_env_steps=10**6,
            prefetch=1, placement=Placement(resources={"simulator": 1}, strategy="SPREAD"),
        )  # fmt: skip
        lose = LoseANode(cluster, data)
        algorithm = PPO(minibatch_size=128, num_epochs=1)
        quiet_trainer(limit_val_batches=0, callbacks=[lose]).fit(algorithm, data)
    (steps / str(os.getpid())).unlink()  # trying the environment out
    found = {
        "homes": lose.homes,
        "env_steps": int(algorithm.env_steps),
        "delivered": data.ledger.delivered,
        "discarded": dict(data.ledger.discarded),
        "stepped": sum(file.stat().st_size for file in steps.iterdir()),
    }
    Path("found.json").write_text(json.dumps(found))


def learners_and_one_lost() -> None:
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        run_of = ["--cluster.ray_address", cluster.address, "--cluster.num_learners"]
        Path("kill-at.txt").write_text("640")
        run(*DQN, *run_of, "2", "--cluster.max_failures", "1", "--cluster.storage_path", "stored", code=0)
        run(*TINY, *run_of, "1", "--cluster.max_failures", "-1", "--data.max_env_steps", "32", code=2)


def run(*args: str, code: int) -> None:
    try:
        cli.main(args)
        ended = 0
    except SystemExit as end:
        ended = end.code
    assert ended == code, ended


if __name__ == "__main__":
    {f.__name__: f for f in (runners_spread_and_a_node_lost, learners_and_one_lost)}[sys.argv[1]]()
