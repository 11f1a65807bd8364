"""RLlib's test of node failures, for lit_rl: PPO on CartPole-v1 while a node of the cluster is lost every 5 iterations.

    RAY_AUTH_MODE=token python benchmarks/node_failures.py

Three Ray nodes of two CPUs each on this machine, and a head that runs nothing; six env runners of one CPU. An iteration
is 4,000 env steps. Every 5 iterations all processes of one node are killed, and a new node is added. RLlib's test
(rllib/algorithms/tests/test_node_failures.py) asks for a return of 450 within 30 iterations. The return is that of the
last 100 training episodes.
"""

import argparse
import json
import time
from typing import Any

import lightning as L
import ray
import torch
from ray.cluster_utils import Cluster

from lit_rl import PPO, Placement, RolloutDataModule
from lit_rl.runners import ray_session

NODE = {"num_cpus": 2}
ITERATION = 4000  # env steps
ITERATIONS, KILL_EVERY, GOAL = 30, 5, 450.0


class LoseNodes(L.Callback):
    """Kills the oldest node and adds another, every `KILL_EVERY` iterations; stops at the goal."""

    def __init__(self, cluster: Cluster, data: RolloutDataModule):
        self.cluster, self.data = cluster, data
        self.nodes = list(cluster.worker_nodes)
        self.iteration = self.killed = 0
        self.best = 0.0
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *args: Any) -> None:
        iteration = int(algorithm.env_steps) // ITERATION
        if iteration == self.iteration:
            return
        self.iteration = iteration
        mean = float(trainer.callback_metrics.get("rollout/return_mean", 0.0))
        self.best = max(self.best, mean)
        line = {
            "iteration": iteration,
            "env_steps": int(algorithm.env_steps),
            "return_mean": round(mean, 1),
            "restarts": self.data.ledger.restarts,
            "discarded": dict(self.data.ledger.discarded),
            "seconds": round(time.monotonic() - self.began),
        }
        print(json.dumps(line), flush=True)
        if mean >= GOAL:
            trainer.should_stop = True
        elif iteration % KILL_EVERY == 0:
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(wait=False, **NODE))
            self.killed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(**NODE)
        ray_session.connect(cluster.address)
        L.seed_everything(seed)
        data = RolloutDataModule(
            "CartPole-v1",
            num_env_runners=6,
            num_envs_per_env_runner=4,
            rollout_length=167,  # 6 x 4 x 167 = 4008 env steps
            max_env_steps=(ITERATIONS + 1) * ITERATION,
            return_window=100,
            placement=Placement(num_cpus=1, strategy="SPREAD"),
        )
        algorithm = PPO(lr=1e-3, num_epochs=10, minibatch_size=256)
        lose = LoseNodes(cluster, data)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[lose],
        )
        trainer.fit(algorithm, data)
        ledger = data.ledger
        assert ledger.delivered == int(algorithm.env_steps), (
            "the learner was given other env steps than the ledger says"
        )
        outcome = "passed" if lose.best >= GOAL and lose.iteration <= ITERATIONS else "failed"
        print(
            f"{outcome}: best return {lose.best:.1f}, {lose.iteration} iterations, {lose.killed} nodes killed, "
            f"{ledger.delivered} env steps learned from, {ledger.executed} executed"
        )
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
