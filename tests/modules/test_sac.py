"""SAC and TQC: their terms by hand, and that they learn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from envs import ClockEnv, IdentityEnv, MaskedEnv, RepeatPreviousEnv, TargetEnv
from gymnasium import spaces
from helpers import check_padding, greedy_return
from tensordict import TensorDict

from lit_rl import MLP, SAC, TQC, Evaluation, GRUNetwork, LSTMNetwork, NatureCNN, ReplayDataModule, load_policy
from lit_rl.distributions import LOG_STD_MAX, SquashedGaussian
from lit_rl.errors import OptionError, SpaceError
from lit_rl.networks.ensemble import Ensemble
from lit_rl.spec import EnvSpec

BOX = EnvSpec("Test", spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-2, 4, (2,), np.float32)).to_dict()
DISCRETE = EnvSpec("Test", spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(3)).to_dict()
SMALL: dict[str, Any] = {"critic_hidden_sizes": [32]}


def small_network(space: Any) -> MLP:
    return MLP(space, hidden_sizes=[32], activation="relu")


def make(kind: type[SAC] = SAC, spec: dict = BOX, **options: Any) -> SAC:
    torch.manual_seed(0)
    algorithm = kind(spec=spec, network=small_network, **SMALL | options)
    algorithm.configure_model()
    return algorithm


def minibatch(num: int = 8, discrete: bool = False, **more: Any) -> TensorDict:
    g = torch.Generator().manual_seed(0)
    action = torch.randint(3, (num,), generator=g) if discrete else torch.rand(num, 2, generator=g) * 2 - 1
    return TensorDict(
        {
            "observation": torch.randn(num, 3, generator=g), "action": action, "discount": torch.full((num,), 0.9),
            "next": {
                "observation": torch.randn(num, 3, generator=g), "reward": torch.randn(num, generator=g),
                "terminated": torch.arange(num) % 4 == 0,
            },
            **more,
        },
        [num],
    )  # fmt: skip


class Dropped(torch.nn.Dropout):
    output_size = 3

    def __init__(self, observation_space: Any):
        super().__init__()


# --- the squashed Gaussian ------------------------------------------------------------------------------------------


def test_squashed_log_probabilities_are_those_of_torchrl() -> None:
    from torchrl.modules import TanhNormal

    distribution = SquashedGaussian(spaces.Box(-1, 1, (2,), np.float32))
    parameters = torch.randn(100, 4, dtype=torch.float64).clamp(max=1.0)
    action, log_prob = distribution.rsample(parameters, torch.randn(100, 2, dtype=torch.float64))
    theirs = TanhNormal(parameters[:, :2], parameters[:, 2:].exp(), upscale=1.0, tanh_loc=False)
    torch.testing.assert_close(log_prob, theirs.log_prob(action))
    torch.testing.assert_close(distribution.evaluate(parameters, action)[0], log_prob)


@pytest.mark.parametrize("unbounded", [-30.0, -12.0, -3.0, 0.0, 5.0, 9.5, 20.0])
def test_squashed_log_probability_is_exact_where_the_action_rounds_to_one(unbounded: float) -> None:
    distribution = SquashedGaussian(spaces.Box(-1, 1, (1,), np.float32))
    mean, noise = unbounded - 0.5, 0.5
    parameters = torch.tensor([[mean, 0.0]], requires_grad=True)
    action, log_prob = distribution.rsample(parameters, torch.tensor([[noise]]))
    u = unbounded  # log(1 - tanh^2 u) = log(4) - 2 log(e^u + e^-u), in numbers that hold it
    log_slope = math.log(4) - 2 * (abs(u) + math.log1p(math.exp(-2 * abs(u))))
    expected = -0.5 * noise**2 - 0.5 * math.log(2 * math.pi) - log_slope
    torch.testing.assert_close(log_prob.item(), expected, atol=1e-4, rtol=1e-5)
    gradient = torch.autograd.grad(log_prob.sum(), parameters)[0]
    torch.testing.assert_close(gradient[0, 0].item(), 2 * math.tanh(u), atol=1e-4, rtol=1e-4)
    assert (action.abs() <= 1).all()


def test_runner_and_learner_agree_on_squashed_actions() -> None:
    distribution = SquashedGaussian(spaces.Box(-2, 4, (2,), np.float32))
    parameters = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    action, log_prob = distribution.sample(parameters, np.random.default_rng(1))
    found = distribution.evaluate(torch.from_numpy(parameters), torch.from_numpy(action))[0]
    inside = np.abs(action).max(1) < 0.999  # nearer to 1 float32 cannot tell where the action came from
    np.testing.assert_allclose(found.numpy()[inside], log_prob[inside], atol=2e-2)
    in_env = distribution.to_env(action)
    assert in_env.min() >= -2 and in_env.max() <= 4 and in_env.dtype == np.float32
    np.testing.assert_allclose(distribution.to_env(np.array([[-1.0, 1.0]])), [[-2.0, 4.0]])
    assert np.isfinite(distribution.evaluate(torch.zeros(1, 4), torch.ones(1, 2))[0]).all()


def test_standard_deviations_stay_in_bounds() -> None:
    distribution = SquashedGaussian(spaces.Box(-1, 1, (1,), np.float32))
    wide, widest = (distribution.rsample(torch.tensor([[0.0, s]]), torch.ones(1, 1)) for s in (50.0, LOG_STD_MAX))
    torch.testing.assert_close(wide, widest)


def test_an_unbounded_box_is_refused() -> None:
    with pytest.raises(SpaceError, match="has no bounds, between which actions could be squashed"):
        make(spec=EnvSpec("Test", spaces.Box(-1, 1, (3,)), spaces.Box(-np.inf, np.inf, (2,))).to_dict())


# --- terms ----------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_several_networks() -> None:
    ensemble = Ensemble(3, 4, [8, 5], 2)
    x = torch.randn(6, 7, 4)
    found = ensemble(x)
    assert found.shape == (3, 6, 7, 2)
    for k in range(3):
        hidden = x
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases)):
            hidden = hidden @ weight[k] + bias[k, 0]
            hidden = hidden.relu() if i < 2 else hidden
        torch.testing.assert_close(found[k], hidden)


def test_frozen_critics_give_gradients_to_their_input_alone() -> None:
    ensemble, x = Ensemble(2, 3, [8], 1), torch.randn(5, 3, requires_grad=True)
    ensemble(x, frozen=True).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in ensemble.parameters())


def test_one_backward_gives_the_gradients_of_three() -> None:
    """Policy, critics and temperature each get the gradient of their own loss alone, as in the paper."""
    algorithm, batch = make(), minibatch()
    algorithm.optimize = lambda loss: loss.backward()
    algorithm.update(batch)  # which adds the noise to it
    found = {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.grad is not None}
    alpha = algorithm.log_alpha.detach().exp()
    policy, critics = algorithm.policy, make().critics
    critics.load_state_dict(algorithm.critics.state_dict())
    make_target = make()
    make_target.load_state_dict(algorithm.state_dict())
    # `update` moved the target critics; the terms of the loss are those from before.
    fresh = make()
    feature = fresh.policy.features(batch)
    with torch.no_grad():
        target = fresh.value_target(batch, fresh.policy.encoder(batch["next", "observation"]), alpha)
    q = fresh.critics(batch["observation"], batch["action"])
    critic = 0.5 * (q - target).square().sum((0, 2)).mean()
    actor, log_prob = fresh.actor_loss(batch, feature, batch["observation"], alpha)
    parts = {"policy": (fresh.policy, actor.mean()), "critics": (fresh.critics, critic)}
    for prefix, (module, loss) in parts.items():
        names, parameters = zip(*module.named_parameters())
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, retain_graph=True)):
            torch.testing.assert_close(found[f"{prefix}.{name}"], gradient)
    expected = -(log_prob + fresh.target_entropy).mean()
    torch.testing.assert_close(found["log_alpha"], expected)
    assert policy is algorithm.policy


def test_targets_by_hand_for_discrete_actions() -> None:
    algorithm, batch = make(spec=DISCRETE), minibatch(4, discrete=True)
    alpha = torch.tensor(0.5)
    next_obs = batch["next", "observation"]
    with torch.no_grad():
        q = algorithm.target(next_obs)  # [2, 4, 3]
        log_probs = torch.log_softmax(algorithm.policy(next_obs), -1)
        found = algorithm.value_target(batch, algorithm.policy.encoder(next_obs), alpha)[:, 0]
    for row in range(4):
        value = sum(
            math.exp(log_probs[row, a]) * (min(q[0, row, a], q[1, row, a]) - 0.5 * log_probs[row, a]) for a in range(3)
        )
        expected = batch["next", "reward"][row] + (0.0 if row % 4 == 0 else 0.9) * value
        torch.testing.assert_close(found[row], expected)


def test_continuous_targets_take_the_smaller_critic_and_the_entropy() -> None:
    algorithm, batch = make(), minibatch(4)
    next_obs, alpha = batch["next", "observation"], torch.tensor(0.5)
    algorithm.draw_noise(batch)
    with torch.no_grad():
        found = algorithm.value_target(batch, algorithm.policy.encoder(next_obs), alpha)[:, 0]
        action, log_prob = algorithm.sample(algorithm.policy(next_obs), batch["next_noise"])
        q = algorithm.target(next_obs, action)[..., 0].min(0).values
    discount = torch.tensor([0.0, 0.9, 0.9, 0.9])
    torch.testing.assert_close(found, batch["next", "reward"] + discount * (q - 0.5 * log_prob))


def test_the_policys_gradient_raises_value_and_entropy() -> None:
    algorithm, batch = make(spec=DISCRETE), minibatch(discrete=True)
    obs, feature = batch["observation"], algorithm.policy.features(batch)
    loss, log_prob = algorithm.actor_loss(batch, feature, obs, torch.tensor(0.3))
    log_probs = torch.log_softmax(algorithm.policy(obs), -1)
    q = algorithm.critics(obs).min(0).values
    expected = (log_probs.exp() * (0.3 * log_probs - q)).sum(-1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_prob, (log_probs.exp() * log_probs).sum(-1))
    assert all(g is None for g in torch.autograd.grad(loss.sum(), [*algorithm.critics.parameters()], allow_unused=True))


@pytest.mark.parametrize(("log_prob", "rises"), [(2.5, True), (1.5, False)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target(log_prob: float, rises: bool) -> None:
    algorithm = make()  # two dimensions: the target is -2
    assert algorithm.target_entropy == -2.0
    algorithm.alpha_loss(torch.tensor([log_prob]), algorithm.target_entropy).sum().backward()
    assert (algorithm.log_alpha.grad < 0) == rises  # descent raises it where the gradient is negative


def test_target_entropy_of_discrete_actions() -> None:
    assert make(spec=DISCRETE).target_entropy == pytest.approx(0.98 * math.log(3))
    assert make(spec=DISCRETE, target_entropy=0.1).target_entropy == 0.1


def test_target_entropy_is_that_of_the_legal_actions() -> None:
    spec = EnvSpec(
        "Test",
        spaces.Dict(observation=spaces.Box(-1, 1, (3,), np.float32), action_mask=spaces.MultiBinary(3)),
        spaces.Discrete(3),
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]])
    obs = {"observation": torch.zeros(3, 3), "action_mask": mask}
    found = make(spec=spec.to_dict()).entropy_target(obs)
    torch.testing.assert_close(found, 0.98 * torch.tensor([2.0, 3.0, 1.0]).log())
    assert make(spec=spec.to_dict(), target_entropy=0.1).entropy_target(obs) == 0.1


def test_a_fixed_temperature_stays() -> None:
    algorithm = make(initial_alpha=0.2, learn_alpha=False)
    algorithm.optimize = lambda loss: loss.backward()
    algorithm.update(minibatch())
    assert "log_alpha" not in dict(algorithm.named_parameters())
    assert float(algorithm.log_alpha.exp()) == pytest.approx(0.2)


def test_tqc_drops_the_greatest_quantiles_of_all_critics() -> None:
    algorithm = make(TQC, num_quantiles=3, num_dropped=1)
    q = torch.tensor([[[5.0, 1.0, 9.0]], [[2.0, 7.0, 3.0]]])  # [K, M, Z]
    torch.testing.assert_close(algorithm.backup(q), torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    torch.testing.assert_close(algorithm.q_value(q), torch.tensor([4.5]))
    assert algorithm.critics(torch.zeros(4, 3), torch.zeros(4, 2)).shape == (2, 4, 3)


def test_importance_weights_scale_the_critics_loss_alone() -> None:
    losses: list[torch.Tensor] = []
    weight = torch.linspace(0.1, 1, 8)
    batches = [minibatch(), minibatch(weight=torch.ones(8)), minibatch(weight=weight)]
    for batch in batches:
        algorithm = make()
        algorithm.generator.manual_seed(3)
        algorithm.optimize = losses.append
        algorithm.update(batch)
    torch.testing.assert_close(losses[0], losses[1])
    assert "priority" not in batches[0].keys()  # noqa: SIM118
    assert batches[2]["priority"].shape == (8,)
    assert losses[2] < losses[1]


@pytest.mark.parametrize("kind", [SAC, TQC])
@pytest.mark.parametrize("spec", [BOX, DISCRETE])
def test_padding_changes_nothing(kind: type[SAC], spec: dict) -> None:
    algorithm = kind(spec=spec, network=GRUNetwork, **SMALL)
    algorithm.configure_model()
    check_padding(algorithm, torch.randint(3, (2, 4)) if spec is DISCRETE else torch.rand(2, 4, 2))


# --- encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("spec", ["box", "discrete"])
def test_image_encoders_shared_or_separate(share: bool, spec: str) -> None:
    action = spaces.Discrete(3) if spec == "discrete" else spaces.Box(-1, 1, (2,), np.float32)
    image = EnvSpec("Test", spaces.Box(0, 255, (36, 36, 3), np.uint8), action)
    algorithm = SAC(spec=image.to_dict(), share_encoder=share, **SMALL)
    algorithm.configure_model()
    assert isinstance(algorithm.policy.encoder, NatureCNN)
    assert (algorithm.critics.encoder is None) == share
    obs = torch.randint(255, (2, 6, 36, 36, 3), dtype=torch.uint8)
    batch = minibatch(6, discrete=spec == "discrete").exclude("observation", ("next", "observation"))
    batch["observation"], batch["next", "observation"] = obs
    algorithm.optimize = lambda loss: loss.backward()
    algorithm.update(batch)
    gradients = {name: p.grad for name, p in algorithm.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    head = {name: p.grad.clone() for name, p in algorithm.policy.named_parameters()}
    if share:  # without the critics' loss nothing reaches the encoder
        algorithm.zero_grad()
        weight = torch.zeros(6)
        batch["weight"] = weight
        algorithm.update(batch)
        assert not any(p.grad.abs().sum() for p in algorithm.policy.encoder.parameters())
        assert algorithm.policy.head.weight.grad.abs().sum() > 0
    assert head["head.weight"].abs().sum() > 0


def test_critics_can_have_a_network_of_their_own() -> None:
    algorithm = make(critic_network=small_network)
    assert isinstance(algorithm.critics.encoder, MLP)
    algorithm.optimize = lambda loss: loss.backward()
    algorithm.update(minibatch())
    assert all(p.grad is not None for p in algorithm.critics.parameters())


def test_learning_rates_of_the_parts() -> None:
    algorithm = make(lr=1e-3, actor_lr=1e-4, alpha_lr=1e-2)
    groups = {
        round(group["lr_scale"], 9): len(group["params"]) for group in algorithm.configure_optimizers().param_groups
    }
    assert groups == {
        0.1: len(list(algorithm.policy.parameters())),
        1.0: len(list(algorithm.critics.parameters())),
        10.0: 1,
    }
    assert len(make().configure_optimizers().param_groups) == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SAC, {"tau": 0}, "tau=0: expected a number, above 0"),
        (SAC, {"initial_alpha": 0.0}, "initial_alpha=0.0"),
        (SAC, {"target_entropy": "high"}, "target_entropy='high': expected a number"),
        (SAC, {"actor_lr": -1.0}, "actor_lr=-1.0"),
        (SAC, {"num_critics": 0}, "num_critics=0"),
        (SAC, {"critic_hidden_sizes": 5}, "critic_hidden_sizes=5: expected a list of whole numbers"),
        (SAC, {"critic_network": LSTMNetwork}, "critic_network=LSTMNetwork: expected a network without memory"),
        (SAC, {"critic_network": Dropped}, "network: it holds Dropped(p=0.5"),
        (SAC, {"network": LSTMNetwork, "share_encoder": False}, "share_encoder=False: LSTMNetwork has memory"),
        (SAC, {"share_encoder": True, "critic_network": small_network}, "critic_network: expected none"),
        (TQC, {"num_quantiles": 3, "num_dropped": 3}, "num_dropped=3: expected less than num_quantiles=3"),
    ],
)
def test_options_are_checked(kind: type[SAC], options: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        kind(spec=BOX, **options).configure_model()
    assert message in str(error.value)


def test_other_action_spaces_are_refused_with_the_way_out() -> None:
    spec = EnvSpec("Test", spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 2]))
    with pytest.raises(SpaceError, match=r"SAC needs a Box or Discrete action space, got MultiDiscrete.*Use PPO"):
        SAC(spec=spec.to_dict()).configure_model()


# --- learning -------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "learning_starts": 64, "batch_size": 64, "rollout_length": 4, "env_steps_per_batch": 400,
    "evaluation": Evaluation(episodes=40),
}  # fmt: skip


@pytest.mark.parametrize("kind", [SAC, pytest.param(TQC, marks=pytest.mark.slow)])
def test_learns_to_hit_the_target(kind: type[SAC]) -> None:
    data = ReplayDataModule(TargetEnv, max_env_steps=2000, update_to_data=0.25, seed=1, **QUICK)
    algorithm = kind(lr=5e-3, network=small_network, tau=0.05, **SMALL)
    assert greedy_return(algorithm, data) > -0.02  # a random policy's is -2/3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SAC, TQC])
def test_learns_discrete_actions(kind: type[SAC]) -> None:
    data = ReplayDataModule(IdentityEnv, max_env_steps=2000, update_to_data=0.25, seed=1, **QUICK)
    algorithm = kind(lr=5e-3, network=small_network, target_entropy=0.1, tau=0.05, **SMALL)
    assert greedy_return(algorithm, data) == 1.0


@pytest.mark.slow
def test_learns_with_action_masks() -> None:
    data = ReplayDataModule(
        MaskedEnv, env_kwargs={"action_space": spaces.Discrete(4)}, max_env_steps=3000, update_to_data=0.25, seed=1,
        **QUICK,
    )  # fmt: skip
    algorithm = SAC(lr=3e-3, gamma=0.5, network=small_network, target_entropy=0.1, tau=0.05, **SMALL)
    assert greedy_return(algorithm, data) > 5.5


@pytest.mark.slow
def test_the_true_value_of_a_reward_for_ever(make_trainer) -> None:
    data = ReplayDataModule(ClockEnv, max_env_steps=2000, update_to_data=0.5, seed=0, prioritized=True, **QUICK)
    algorithm = SAC(lr=5e-3, gamma=0.9, tau=0.2, initial_alpha=1e-4, learn_alpha=False, network=small_network, **SMALL)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    assert algorithm.critics(torch.zeros(1, 1)).mean().item() == pytest.approx(10, abs=0.7)


@pytest.mark.slow
def test_memory_solves_what_needs_memory() -> None:
    data = ReplayDataModule(
        RepeatPreviousEnv, num_envs_per_env_runner=8, rollout_length=8, max_env_steps=16_000, batch_size=160,
        learning_starts=640, update_to_data=1 / 16, seed=1, env_steps_per_batch=2000,
        evaluation=Evaluation(episodes=40),
    )  # fmt: skip
    algorithm = SAC(
        lr=5e-3, gamma=0.5, network=LSTMNetwork, tau=0.05, sequence_length=5, burn_in=2, target_entropy=0.1, **SMALL
    )
    assert greedy_return(algorithm, data) > 7.5  # 8 is the best, 4 a guess


@pytest.mark.parametrize("kind", [SAC, TQC])
def test_the_policy_in_a_checkpoint_acts_as_in_evaluation(kind: type[SAC], make_trainer, tmp_path) -> None:
    data = ReplayDataModule("Pendulum-v1", max_env_steps=300, update_to_data=0.1, seed=0, **QUICK)
    algorithm, trainer = kind(), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(tmp_path / "sac.ckpt")
    policy = load_policy(tmp_path / "sac.ckpt")  # its default network is named in the file
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.testing.assert_array_equal(policy.act(obs)[0], algorithm.policy.act(obs)[0])
    assert np.abs(policy.act(obs)[0]).max() <= 2
    again = kind.load_from_checkpoint(tmp_path / "sac.ckpt")
    torch.testing.assert_close(
        again.critics(torch.zeros(1, 3), torch.zeros(1, 1)), algorithm.critics(torch.zeros(1, 3), torch.zeros(1, 1))
    )
