"""bf16-mixed: networks compute in bfloat16, what leaves them is float32, and training goes where float32's goes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl import (
    APPO,
    DQN,
    IMPALA,
    PPO,
    SAC,
    TQC,
    Evaluation,
    GRUNetwork,
    Rainbow,
    ReplayDataModule,
    RolloutDataModule,
)
from lit_rl.losses import quantile_huber_loss

UPDATES = 12
MAKE = {
    "PPO": lambda **o: PPO(minibatch_size=32, num_epochs=3, **o),
    "IMPALA": lambda **o: IMPALA(**o),
    "APPO": lambda **o: APPO(**o),
    "DQN": lambda **o: DQN(**o),
    "Rainbow": lambda **o: Rainbow(**o),
    "SAC": lambda **o: SAC(**o),
    "TQC": lambda **o: TQC(**o),
}


def run(make_trainer: Any, name: str, memory: bool, precision: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The weights before and after a short run, and what was logged last."""
    options: dict[str, Any] = {"network": GRUNetwork} if memory else {}
    if memory and name not in ("IMPALA", "APPO"):
        options["sequence_length"] = 8
    algorithm = MAKE[name](**options)
    env = "CartPole-v1" if name in ("DQN", "Rainbow") else "Pendulum-v1"
    common: dict[str, Any] = {"evaluation": Evaluation(episodes=1), "seed": 3}
    if name == "PPO":
        data: Any = RolloutDataModule(env, num_envs_per_env_runner=2, rollout_length=64, max_env_steps=128, **common)
    elif name in ("IMPALA", "APPO"):
        data = RolloutDataModule(
            env, num_envs_per_env_runner=2, rollout_length=16, max_env_steps=32 * UPDATES, **common
        )
    else:
        data = ReplayDataModule(env, learning_starts=64, batch_size=32, max_env_steps=64 + UPDATES, **common)
    before: list[Tensor] = []
    start = algorithm.on_fit_start

    def on_fit_start() -> None:
        start()
        before.append(weights(algorithm))

    algorithm.on_fit_start = on_fit_start
    trainer = make_trainer(precision=precision, limit_val_batches=0)
    trainer.fit(algorithm, data)
    return before[0], weights(algorithm), trainer.callback_metrics


def weights(algorithm: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in algorithm.parameters() if p.requires_grad])


@pytest.mark.parametrize("memory", [False, True], ids=["", "GRU"])
@pytest.mark.parametrize("name", MAKE)
def test_training_in_bf16_goes_where_it_goes_in_float32(make_trainer, name: str, memory: bool) -> None:
    begin, expected, _ = run(make_trainer, name, memory, "32-true")
    same, found, metrics = run(make_trainer, name, memory, "bf16-mixed")
    assert torch.equal(begin, same)
    losses = {key: value for key, value in metrics.items() if key.startswith("loss/")}
    assert losses and all(value.isfinite() for value in losses.values())
    assert metrics["optim/skipped_updates"] == 0
    moved, expected = found - begin, expected - begin
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.8
    assert 0.8 < moved.norm() / expected.norm() < 1.25


def test_each_gradient_step_sees_the_weights_that_the_one_before_left(make_trainer) -> None:
    seen: list[Tensor] = []

    class Watched(PPO):
        def loss(self, batch: Any) -> Any:
            with torch.no_grad():
                seen.append(self.policy(torch.ones(1, 4)))
            return super().loss(batch)

    data = RolloutDataModule("CartPole-v1", num_envs_per_env_runner=2, rollout_length=64, max_env_steps=128, seed=0)
    trainer = make_trainer(precision="bf16-mixed", limit_val_batches=0)
    trainer.fit(Watched(minibatch_size=32, num_epochs=2, lr=0.05), data)
    assert len(seen) == 8 and all(x.dtype == torch.float32 for x in seen)
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_the_highest_of_many_quantiles_comes_down_in_any_precision() -> None:
    quantiles = torch.zeros(1, 200, dtype=torch.bfloat16, requires_grad=True)
    quantile_huber_loss(quantiles, torch.full((1, 1), -1.0)).sum().backward()
    assert quantiles.grad is not None and quantiles.grad[0, -1] > 0.002


@pytest.mark.parametrize("cls", [IMPALA, APPO])
def test_the_ratios_of_policies_and_the_values_are_float32_in_any_precision(make_trainer, cls: Any) -> None:
    seen = set()

    class Watched(cls):
        def targets(self, batch: Any, *given: Tensor) -> Any:
            found = super().targets(batch, *given)
            seen.update(x.dtype for x in (*given, *found, batch["bootstrap_value"], batch["action_log_prob"]))
            return found

    data = RolloutDataModule("Pendulum-v1", num_envs_per_env_runner=2, rollout_length=16, max_env_steps=64, seed=0)
    make_trainer(precision="bf16-mixed", limit_val_batches=0).fit(Watched(), data)
    assert seen == {torch.float32}
