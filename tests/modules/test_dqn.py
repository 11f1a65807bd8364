"""DQN and the six parts of Rainbow: what each changes, by hand; and that it learns."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import ClockEnv, IdentityEnv, MaskedEnv, PictureEnv, RepeatPreviousEnv
from gymnasium import spaces
from helpers import check_padding, greedy_return
from tensordict import TensorDict

from lit_rl import (
    DQN,
    MLP,
    Evaluation,
    GRUNetwork,
    LSTMNetwork,
    Rainbow,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.errors import OptionError
from lit_rl.replay.feed import ALONE
from lit_rl.spec import EnvSpec

SPEC = EnvSpec("Test", spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2)).to_dict()
QUICK: dict[str, Any] = {
    "learning_starts": 64, "batch_size": 64, "rollout_length": 4, "env_steps_per_batch": 400,
    "evaluation": Evaluation(episodes=40),
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "plain": {"double": False},
    "double": {},
    "dueling": {"dueling": True},
    "noisy": {"noisy": True},
    "categorical": {"distributional": "categorical", "v_min": 0.0, "v_max": 2.0, "num_atoms": 11},
    "quantile": {"distributional": "quantile", "num_atoms": 9},
}


def linear_q(values: list, **options: Any) -> DQN:
    """A DQN whose values are `values` [A] times the observation."""
    algorithm = DQN(spec=SPEC, gamma=0.5, network=Identity, **options)
    algorithm.configure_model()
    for policy, scale in ((algorithm.policy, 1.0), (algorithm.target, 10.0)):
        with torch.no_grad():
            policy.head.weight.copy_(torch.tensor(values)[:, None] * scale)
            policy.head.bias.zero_()
    return algorithm


class Identity(torch.nn.Module):
    output_size = 1

    def __init__(self, observation_space: Any):
        super().__init__()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs


def minibatch(**more: Any) -> TensorDict:
    """Rows: goes on; terminated; truncated (goes on, since it is bootstrapped); two steps summed."""
    return TensorDict(
        {
            "observation": torch.tensor([[1.0], [1.0], [1.0], [2.0]]),
            "action": torch.tensor([0, 1, 0, 1]),
            "discount": torch.tensor([0.5, 0.5, 0.5, 0.25]),
            "next": {
                "observation": torch.tensor([[2.0], [2.0], [3.0], [-1.0]]),
                "reward": torch.tensor([1.0, 1.0, 1.0, 3.0]),
                "terminated": torch.tensor([False, True, False, False]),
            },
            **more,
        },
        [4],
    )


# The network says Q = obs * [1, 3]; the target network ten times that, for the plain table.
@pytest.mark.parametrize(
    ("double", "target_values", "expected"),
    [
        # max of the target network: 2 * 30, -, 3 * 30, -1 * 10
        (False, [10.0, 30.0], [1 + 0.5 * 60, 1.0, 1 + 0.5 * 90, 3 + 0.25 * -10]),
        # the target network would choose the other action: its maxima are 2 * 30, 3 * 30, -1 * 10
        (False, [30.0, 10.0], [1 + 0.5 * 60, 1.0, 1 + 0.5 * 90, 3 + 0.25 * -10]),
        # double: the network chooses 1, 1, 0; the target network values these 2 * 10, 3 * 10, -1 * 30
        (True, [30.0, 10.0], [1 + 0.5 * 20, 1.0, 1 + 0.5 * 30, 3 + 0.25 * -30]),
    ],
)
def test_targets_by_hand(double: bool, target_values: list, expected: list) -> None:
    algorithm = linear_q([1.0, 3.0], double=double, loss="mse")
    with torch.no_grad():
        algorithm.target.head.weight.copy_(torch.tensor(target_values)[:, None])
    batch = minibatch()
    output = torch.tensor([1.0, 3.0, 1.0, 6.0])[:, None]  # Q of the actions taken
    with torch.no_grad():
        next_outputs = algorithm.next_outputs(batch, batch["next", "observation"] if double else None)
    loss, td_error = algorithm.losses(batch, output, next_outputs)
    torch.testing.assert_close(td_error, torch.tensor(expected) - output[:, 0])
    torch.testing.assert_close(loss, 0.5 * td_error.square())


def test_targets_agree_with_torchrl() -> None:
    from torchrl.data import OneHot  # noqa: F401  loads torchrl's data before its objectives
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss

    algorithm = linear_q([1.0, 3.0], loss="mse")
    with torch.no_grad():
        algorithm.target.head.weight.copy_(torch.tensor([[30.0], [10.0]]))
    batch = minibatch()[:3]  # the fourth has a discount of its own
    actor = QValueActor(torch.nn.Linear(1, 2, bias=False), in_keys=["observation"], action_space="categorical")
    theirs = DQNLoss(actor, loss_function="l2", delay_value=True, double_dqn=True, action_space="categorical")
    theirs.make_value_estimator(gamma=0.5)
    for parameters, policy in (
        (theirs.value_network_params, algorithm.policy),
        (theirs.target_value_network_params, algorithm.target),
    ):
        for _, parameter in parameters.items(include_nested=True, leaves_only=True):
            parameter.data.copy_(policy.head.weight.data)
    data = batch.clone()
    for key in ("reward", "terminated"):
        data["next", key] = data["next", key][:, None]
    data["next", "done"] = data["next", "terminated"]
    found = theirs(data)["loss"]
    output = torch.tensor([[1.0], [3.0], [1.0]])
    with torch.no_grad():
        next_outputs = algorithm.next_outputs(batch, batch["next", "observation"])
    torch.testing.assert_close(found, 2 * algorithm.losses(batch, output, next_outputs)[0].mean())


def test_the_next_action_is_a_legal_one() -> None:
    spec = EnvSpec(
        "Test",
        spaces.Dict(observation=spaces.Box(-1, 1, (1,), np.float32), action_mask=spaces.MultiBinary(2)),
        spaces.Discrete(2),
    )
    for double in (False, True):
        algorithm = DQN(spec=spec.to_dict(), network=Identity, double=double)
        algorithm.configure_model()
        with torch.no_grad():
            for policy in (algorithm.policy, algorithm.target):
                policy.head.weight.copy_(torch.tensor([[1.0], [3.0]]))
                policy.head.bias.zero_()
            obs = {"observation": torch.tensor([[1.0], [1.0]]), "action_mask": torch.tensor([[1, 0], [1, 1]])}
            batch = TensorDict({"next": {"observation": obs}}, [2])
            found = algorithm.next_outputs(batch, obs["observation"] if double else None)
        torch.testing.assert_close(found, torch.tensor([[1.0], [3.0]]))


def test_the_target_network_follows_when_it_is_told_to() -> None:
    hard, soft = linear_q([1.0, 3.0], target_update_interval=3, tau=1.0), linear_q([1.0, 3.0], tau=0.1)
    for algorithm in (hard, soft):
        algorithm.optimize = lambda loss: True  # the network stays
    moved = []
    for k in range(6):
        hard.update(minibatch())
        hard.updates += 1
        moved.append(torch.equal(hard.target.head.weight, hard.policy.head.weight))
        soft.update(minibatch())
        expected = torch.tensor([1.0, 3.0]) * (1 + 9 * 0.9 ** (k + 1))
        torch.testing.assert_close(soft.target.head.weight[:, 0], expected)
    assert moved == [False, False, True, True, True, True]
    assert not any(p.requires_grad for p in hard.target.parameters())
    before = soft.target.head.weight.clone()
    soft.optimize = lambda loss: False  # a step that was skipped since its loss was not finite
    soft.update(minibatch())
    assert torch.equal(soft.target.head.weight, before)


def test_importance_weights_scale_the_loss_and_td_errors_become_priorities() -> None:
    algorithm = linear_q([1.0, 3.0], loss="mse", double=False)
    losses: list[torch.Tensor] = []
    algorithm.optimize = losses.append
    algorithm.update(minibatch())
    weight = torch.tensor([1.0, 0.5, 0.0, 0.25])
    weighted = minibatch(weight=weight)
    algorithm.update(weighted)
    td_error = torch.tensor([1 + 0.5 * 60, 1.0, 1 + 0.5 * 90, 3 + 0.25 * -10]) - torch.tensor([1.0, 3.0, 1.0, 6.0])
    torch.testing.assert_close(losses[0], (0.5 * td_error.square()).mean())
    torch.testing.assert_close(losses[1], (0.5 * td_error.square() * weight).mean())
    torch.testing.assert_close(weighted["priority"], td_error.abs())


def test_the_priority_of_a_distribution_is_its_kl_divergence() -> None:
    algorithm = DQN(spec=SPEC, distributional="categorical", v_min=0.0, v_max=10.0, num_atoms=5)
    algorithm.configure_model()
    algorithm.optimize = lambda loss: None
    batch = minibatch(weight=torch.ones(4))
    algorithm.update(batch)
    assert (batch["priority"] > 0).all()
    # Nothing to learn: the reward is 0 and nothing is discounted, so the target is the network's own distribution.
    same = minibatch(weight=torch.ones(4))
    same["next", "reward"], same["discount"] = torch.zeros(4), torch.ones(4)
    same["next", "observation"], same["next", "terminated"] = same["observation"], torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        outputs = algorithm.policy.distributions(algorithm.policy.encoder(same["observation"]))
        best = algorithm.policy.expectation(outputs).argmax(-1)
    same["action"] = best
    algorithm.update(same)
    torch.testing.assert_close(same["priority"], torch.zeros(4), atol=1e-5, rtol=0.0)


def test_padding_changes_nothing() -> None:
    algorithm = DQN(spec=SPEC, network=LSTMNetwork, loss="mse")
    algorithm.configure_model()
    check_padding(algorithm, torch.randint(2, (2, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.5}, "epsilon=1.5: expected a number, at least 0 and at most 1"),
        ({"epsilon": [[0, 1.0]]}, "epsilon=[[0, 1.0]]: expected a number, at least 0 and at most 1. Points"),
        ({"epsilon_schedule": [[0, 2.0]]}, "epsilon_schedule=2.0: expected a number, at least 0 and at most 1"),
        ({"epsilon": "linear"}, "epsilon='linear': expected a number"),
        ({"loss": "l1"}, "loss='l1': expected one of"),
        ({"distributional": "c51"}, "distributional='c51': expected None, 'categorical' or 'quantile'"),
        ({"v_min": 3.0, "v_max": 3.0}, "v_min=3.0: expected less than v_max=3.0"),
        ({"num_atoms": 1}, "num_atoms=1: expected a whole number of at least 2"),
        ({"tau": 0.0}, "tau=0.0: expected a number, above 0"),
        ({"target_update_interval": 0}, "target_update_interval=0"),
        ({"double": "yes"}, "double='yes': expected True or False"),
        ({"head_hidden_sizes": 64}, "head_hidden_sizes=64: expected a list of whole numbers"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        DQN(**options)
    assert message in str(error.value)


def test_burn_in_needs_memory() -> None:
    with pytest.raises(OptionError, match="burn_in=4: expected a network with memory"):
        DQN(spec=SPEC, burn_in=4).configure_model()


def test_layers_that_act_otherwise_than_they_learn_are_refused() -> None:
    with pytest.raises(OptionError, match=r"network: it holds Batched\(1"):
        DQN(spec=SPEC, network=Batched).configure_model()


class Batched(torch.nn.BatchNorm1d):
    output_size = 1

    def __init__(self, observation_space: Any):
        super().__init__(1)


@pytest.mark.parametrize(
    "part", [part if part == "double" else pytest.param(part, marks=pytest.mark.slow) for part in PARTS]
)
def test_learns_to_name_what_it_sees(part: str) -> None:
    data = ReplayDataModule(IdentityEnv, max_env_steps=2400, update_to_data=0.25, seed=1, **QUICK)
    epsilon = None if part == "noisy" else 0.2
    algorithm = DQN(lr=5e-3, target_update_interval=20, epsilon=epsilon, **PARTS[part])
    assert greedy_return(algorithm, data) == 1.0


@pytest.mark.slow
def test_rainbow_learns_to_name_what_it_sees() -> None:
    data = ReplayDataModule(IdentityEnv, max_env_steps=2400, update_to_data=0.25, seed=1, **QUICK)
    algorithm = Rainbow(lr=5e-3, target_update_interval=20, v_min=0.0, v_max=1.0, num_atoms=11)
    assert greedy_return(algorithm, data) == 1.0
    assert data.feeds[ALONE].options.num_steps == (3, 3) and "weight" in data.buffer.sample(1, beta=1.0).keys()  # noqa: SIM118


@pytest.mark.slow
def test_learns_from_pictures() -> None:
    data = ReplayDataModule(PictureEnv, max_env_steps=1600, update_to_data=0.1, seed=1, **QUICK)
    assert greedy_return(DQN(lr=1e-3, target_update_interval=10, epsilon=0.3), data) == 1.0


@pytest.mark.slow
def test_learns_with_action_masks() -> None:
    data = ReplayDataModule(
        MaskedEnv, env_kwargs={"action_space": spaces.Discrete(4)}, max_env_steps=3000, update_to_data=0.25, seed=1,
        **QUICK,
    )  # fmt: skip
    trained = greedy_return(DQN(lr=2e-3, gamma=0.5, target_update_interval=20), data)
    assert trained > 5.5  # the mask of each step decides what can be had; random legal actions give about 4.5


@pytest.mark.slow
@pytest.mark.parametrize(("network", "options"), [(LSTMNetwork, {}), (GRUNetwork, {"prioritized": True, "n_step": 2})])
def test_memory_solves_what_needs_memory(network: type, options: dict) -> None:
    data = ReplayDataModule(
        RepeatPreviousEnv, num_envs_per_env_runner=8, rollout_length=8, max_env_steps=16_000, batch_size=160,
        learning_starts=640, update_to_data=1 / 16, seed=1, env_steps_per_batch=2000,
        evaluation=Evaluation(episodes=40),
        **options,
    )  # fmt: skip
    algorithm = DQN(
        lr=5e-3, gamma=0.5, network=network, target_update_interval=1, tau=0.05, epsilon=0.2, sequence_length=5,
        burn_in=2,
    )  # fmt: skip
    assert greedy_return(algorithm, data) > 7.5  # 8 is the best, 4 a guess


@pytest.mark.slow
@pytest.mark.parametrize("n_step", [1, 3])
def test_values_bootstrap_after_truncation(n_step: int, make_trainer) -> None:
    """Reward 1 for ever, cut at 5 steps: the value is 1 / (1 - gamma), not a sum of five rewards."""
    data = ReplayDataModule(ClockEnv, max_env_steps=2000, n_step=n_step, update_to_data=0.5, seed=0, **QUICK)
    algorithm = DQN(lr=5e-3, gamma=0.9, target_update_interval=1, tau=0.2, loss="huber", network=MLP)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    value = algorithm.policy(torch.zeros(1, 1)).mean()
    assert abs(float(value) - 10) < 0.7


def test_the_policy_in_a_checkpoint_acts_as_in_evaluation(make_trainer, tmp_path) -> None:
    data = ReplayDataModule("CartPole-v1", max_env_steps=400, update_to_data=0.1, seed=0, **QUICK)
    algorithm, trainer = Rainbow(), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(tmp_path / "rainbow.ckpt")
    policy = load_policy(tmp_path / "rainbow.ckpt")
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    assert (policy.act(obs)[0] == algorithm.policy.act(obs)[0]).all()
    assert (policy.act(obs)[0] == policy.act(obs)[0]).all()  # no noise


def test_the_wrong_datamodule_is_refused(make_trainer) -> None:
    with pytest.raises(OptionError, match=r"model=DQN: RolloutDataModule .* Use ReplayDataModule"):
        make_trainer().fit(DQN(), RolloutDataModule("CartPole-v1", max_env_steps=5000))
