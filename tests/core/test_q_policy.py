"""Heads that value actions, and the policy that takes the best one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import MaskedEnv
from gymnasium import spaces
from helpers import make_runner

from lit_rl import DQN, ReplayDataModule, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError, SpaceError
from lit_rl.networks.q import NoisyLinear, QHead, set_noise
from lit_rl.policy import Policy
from lit_rl.policy.q import QPolicy
from lit_rl.spec import EnvSpec

SPEC = EnvSpec("Test", spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4, start=2))
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dueling": {"dueling": True},
    "noisy": {"noisy": 0.5},
    "categorical": {"distributional": "categorical", "num_atoms": 11},
    "quantile": {"distributional": "quantile", "num_atoms": 7},
    "hidden": {"hidden_sizes": [16]},
    "all": {"dueling": True, "noisy": 0.5, "distributional": "categorical", "hidden_sizes": [16]},
}


def test_dueling_values_are_the_states_plus_centred_advantages() -> None:
    head = QHead(2, 3, dueling=True)
    x = torch.randn(5, 2)
    value, advantage = head.value(x), head.advantage(x)
    torch.testing.assert_close(head(x), value + advantage - advantage.mean(1, keepdim=True))
    torch.testing.assert_close(head(x).mean(1, keepdim=True), value)  # the advantages have no part in the mean
    plain = QHead(2, 3)
    torch.testing.assert_close(plain(x), plain.advantage(x))


def test_dueling_distributions_are_centred_atom_by_atom() -> None:
    head = QHead(2, 3, num_atoms=5, dueling=True)
    x = torch.randn(4, 2)
    torch.testing.assert_close(head.distributions(x).mean(1), head.value(x))


def test_a_categorical_head_is_worth_the_mean_of_its_support() -> None:
    head = QHead(2, 2, num_atoms=3, support=torch.tensor([0.0, 10.0, 20.0]))
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    torch.testing.assert_close(head.expectation(logits), torch.tensor([[7.5, 17.0]]))


def test_a_quantile_head_is_worth_the_mean_of_its_quantiles() -> None:
    torch.testing.assert_close(
        QHead(2, 1, num_atoms=3).expectation(torch.tensor([[1.0, 2.0, 6.0]])), torch.tensor(3.0)[None]
    )


def test_noise_is_the_papers_factorised_one() -> None:
    layer = NoisyLinear(3, 2, sigma0=0.5)
    torch.testing.assert_close(layer.weight_sigma, torch.full((2, 3), 0.5 / 3**0.5))
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), x @ layer.weight_mu.T + layer.bias_mu)  # without noise the means
    numbers = iter([torch.tensor([4.0, -9.0, 1.0]), torch.tensor([0.25, -1.0])])
    layer.resample(lambda size: next(numbers))
    e_in, e_out = torch.tensor([2.0, -3.0, 1.0]), torch.tensor([0.5, -1.0])  # sign(e) sqrt|e|
    weight = layer.weight_mu + layer.weight_sigma * torch.outer(e_out, e_in)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias_mu + layer.bias_sigma * e_out)
    set_noise(layer, None)
    torch.testing.assert_close(layer(x), x @ layer.weight_mu.T + layer.bias_mu)


def test_noise_explores_while_training_and_is_off_in_evaluation() -> None:
    policy = QPolicy(SPEC, noisy=2.0)
    obs = np.tile(np.array([[0.3, -0.2, 0.1]], np.float32), (1, 1))
    greedy = {int(policy.step(obs, deterministic=True)[0][0]) for _ in range(50)}
    noisy = {int(policy.sample(obs)[0][0]) for _ in range(50)}
    assert len(greedy) == 1 and len(noisy) > 1


@pytest.mark.parametrize("part", PARTS)
def test_the_greedy_action_has_the_greatest_value_for_one_and_for_many(part: str) -> None:
    policy = QPolicy(SPEC, **PARTS[part]).eval()
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    with torch.no_grad():
        q = policy(torch.from_numpy(obs))
        assert q.shape == (50, 4)
        features = policy.encoder(torch.from_numpy(obs))
        torch.testing.assert_close(policy.expectation(policy.distributions(features)), q)
    best = q.argmax(1).numpy() + 2  # the space starts at 2
    assert (policy.act(obs)[0] == best).all()
    assert policy.act(obs[0])[0] == best[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_description_rebuilds_the_same_head(part: str) -> None:
    policy = QPolicy(SPEC, **PARTS[part])
    again = QPolicy.from_description(policy.describe())
    again.load_weights(policy.state_dict())
    obs = torch.randn(6, 3)
    torch.testing.assert_close(again(obs), policy(obs))
    assert policy.describe()["class"] == "QPolicy"


def test_epsilon_takes_random_legal_actions_at_its_rate() -> None:
    policy = QPolicy(SPEC)
    policy.rng = np.random.default_rng(0)
    obs = np.zeros((1, 3), np.float32)
    best = int(policy.sample(obs)[0][0])
    for epsilon in (0.0, 0.3, 1.0):
        policy.epsilon = epsilon
        actions = np.array([policy.sample(obs)[0][0] for _ in range(4000)])
        assert (actions != best).mean() == pytest.approx(epsilon * 3 / 4, abs=0.03)
        assert int(policy.step(obs, deterministic=True)[0][0]) == best


@pytest.mark.parametrize("part", ["plain", "all"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_no_illegal_action_is_taken(part: str, epsilon: float) -> None:
    config = EnvConfig(MaskedEnv, {"action_space": spaces.Discrete(4)}, (), "sync")  # raises at an illegal action
    runner = make_runner(config, QPolicy(config.spec(), **PARTS[part]), 4, 500)
    runner.set_version(0, [epsilon])
    assert runner.sample().failures == ()


@pytest.mark.parametrize(
    ("space", "epsilon"),
    [
        (spaces.MultiDiscrete([2, 3]), 1.0),
        (spaces.MultiBinary(3), 1.0),
        (spaces.Box(np.float32([-2, 0]), np.float32([2, np.inf])), 1.0),
        (spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-1, 1, (2,))), 1.0),
    ],
)
def test_any_policy_can_act_at_random(space: spaces.Space, epsilon: float) -> None:
    policy = Policy(EnvSpec("Test", SPEC.observation_space, space))
    policy.epsilon = epsilon
    obs = np.zeros((200, 3), np.float32)
    actions = policy.to_env(policy.sample(obs)[0])
    first = {key: x[0] for key, x in actions.items()} if isinstance(actions, dict) else actions[0]
    assert space.contains(first)


def test_random_box_actions_are_spread_over_the_bounds() -> None:
    space = spaces.Box(-2, 4, (1,), np.float32)
    for squash in (False, True):
        policy = Policy(EnvSpec("Test", SPEC.observation_space, space), squash=squash)
        policy.epsilon = 1.0
        actions = policy.to_env(policy.sample(np.zeros((5000, 3), np.float32))[0])
        assert abs(actions.mean() - 1) < 0.1 and abs(actions.std() - 6 / 12**0.5) < 0.1


@pytest.mark.parametrize("action", [spaces.Box(-1, 1, (2,), np.float32), spaces.MultiDiscrete([2, 2])])
def test_dqn_refuses_other_actions_with_the_way_out(action: spaces.Space) -> None:
    with pytest.raises(SpaceError, match=r"needs a Discrete action space, got .* from env 'Test'. Use SAC"):
        QPolicy(EnvSpec("Test", SPEC.observation_space, action))


def test_a_policy_class_must_value_actions() -> None:
    with pytest.raises(OptionError, match=r"policy_class=.*: expected a subclass of lit_rl.QPolicy"):
        DQN(policy_class=Policy)


class Cautious(QPolicy):
    """Never takes the last action."""

    def choose(self, features: torch.Tensor, obs: Any, deterministic: bool) -> tuple[Any, Any]:
        q = self.action_parameters(features, obs)[..., :-1]
        return q.argmax(-1), torch.zeros(len(q))


def test_a_subclass_of_ones_own_chooses_and_is_passed_to_load_policy(make_trainer, tmp_path: Path) -> None:
    data = ReplayDataModule(
        "CartPole-v1", max_env_steps=300, learning_starts=100, batch_size=32, env_steps_per_batch=100,
        random_warmup=False, seed=0,
    )  # fmt: skip
    algorithm = DQN(policy_class=Cautious, epsilon=0.0)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    assert (data.buffer.sample(200)["action"] == 0).all()
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    policy = load_policy(tmp_path / "own.ckpt", policy_class=Cautious)
    assert policy.act(np.zeros(4))[0] == 0
