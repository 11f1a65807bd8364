"""IQL: its three losses by hand and by torchrl's, and what it learns from recorded actions."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import check_padding
from recorded import Drawn, bandit, learn, one_update
from tensordict import TensorDict

from lit_rl import IQL, MLP, GRUNetwork, LSTMNetwork
from lit_rl.errors import OptionError, SpaceError
from lit_rl.losses import expectile_loss
from lit_rl.spec import EnvSpec

OBS = spaces.Box(-1, 1, (3,), np.float32)
BOX = EnvSpec("Test", OBS, spaces.Box(-2, 4, (2,), np.float32)).to_dict()
DISCRETE = EnvSpec("Test", OBS, spaces.Discrete(3)).to_dict()
STATES = spaces.Box(0, 1, (2,), np.float32)
SMALL = functools.partial(MLP, hidden_sizes=[32], activation="relu")


def make(spec: dict = BOX, **options: Any) -> IQL:
    torch.manual_seed(0)
    algorithm = IQL(spec=spec, **{"network": SMALL, "critic_hidden_sizes": [32]} | options)
    algorithm.configure_model()
    with torch.no_grad():  # else a target critic says what the critic says
        for parameter in algorithm.target.parameters():
            parameter.mul_(2.0)
    return algorithm


def minibatch(num: int = 6, discrete: bool = False, **more: Any) -> TensorDict:
    """Rows of which every third was terminated; the others go on, be it that they were truncated."""
    g = torch.Generator().manual_seed(0)
    action = torch.randint(3, (num,), generator=g) if discrete else torch.rand(num, 2, generator=g) * 2 - 1
    return TensorDict(
        {
            "observation": torch.randn(num, 3, generator=g), "action": action, "discount": torch.full((num,), 0.9),
            "is_init": torch.arange(num) % 2 == 0,
            "next": {
                "observation": torch.randn(num, 3, generator=g), "reward": 3 * torch.randn(num, generator=g),
                "terminated": torch.arange(num) % 3 == 0,
            },
            **more,
        },
        [num],
    )  # fmt: skip


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_losses_by_hand(discrete: bool) -> None:
    options: dict[str, Any] = {"expectile": 0.8, "beta": 2.0, "max_weight": 1.1}
    spec = DISCRETE if discrete else BOX
    algorithm, batch, fresh = make(spec, **options), minibatch(discrete=discrete), make(spec, **options)
    obs, action, rows = batch["observation"], batch["action"], range(6)
    with torch.no_grad():
        values = (fresh.critics(obs), fresh.target(obs)) if discrete else None
        if values is None:
            values = fresh.critics(obs, action), fresh.target(obs, action)
        q, target = (x[:, range(6), action] if discrete else x[..., 0] for x in values)
        v, next_v = (fresh.state_value(x)[0, :, 0] for x in (obs, batch["next", "observation"]))
        parameters = fresh.policy(obs)
        log_prob = fresh.policy.distribution.evaluate(parameters, action)[0]
    metrics, _ = one_update(algorithm, batch)
    state_value, critic, policy, weights = [], [], [], []
    for row in rows:
        advantage = float(min(target[0, row], target[1, row]) - v[row])
        state_value.append((0.8 if advantage > 0 else 0.2) * advantage**2)
        y = float(batch["next", "reward"][row]) + (0.0 if row % 3 == 0 else 0.9) * float(next_v[row])
        critic.append(0.5 * sum((float(q[k, row]) - y) ** 2 for k in range(2)))
        weights.append(min(math.exp(2 * advantage), 1.1))
        policy.append(-weights[-1] * float(log_prob[row]))
    assert max(weights) == 1.1 > min(weights)  # bounded in some rows, not in others
    for name, expected in (
        ("loss/state_value", state_value), ("loss/value", critic), ("loss/policy", policy),
        ("imitation/weight", weights),
    ):  # fmt: skip
        assert metrics[name].item() == pytest.approx(np.mean(expected), rel=1e-4), name


def test_each_part_gets_the_gradient_of_its_own_loss_alone() -> None:
    """No gradient flows through the weights, the targets or the advantages into the others."""
    algorithm, batch = make(), minibatch()
    _, gradients = one_update(algorithm, batch)
    fresh = make()
    obs, action = batch["observation"], batch["action"]
    target_q = fresh.target(obs, action).amin(0)[:, 0].detach()
    value = fresh.state_value(obs)[0, :, 0]
    y = fresh.value_target(batch, None).detach()
    q = fresh.critics(obs, action)[..., 0]
    weight = (3 * (target_q - value.detach())).exp().clamp(max=100)
    log_prob = fresh.policy.distribution.evaluate(fresh.policy(obs), action)[0]
    losses = {
        "state_value": expectile_loss(target_q - value, 0.7), "critics": 0.5 * (q - y).square().sum(0),
        "policy": -weight * log_prob,
    }  # fmt: skip
    for part, loss in losses.items():
        names, parameters = zip(*getattr(fresh, part).named_parameters())
        for name, gradient in zip(names, torch.autograd.grad(loss.mean(), parameters)):
            torch.testing.assert_close(gradients[f"{part}.{name}"], gradient, atol=1e-6, rtol=1e-4)
    assert not any(name.startswith("target") for name in gradients)


def test_losses_are_torchrls() -> None:
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.data import OneHot  # noqa: F401  loads torchrl's data before its objectives
    from torchrl.modules import TanhNormal, ValueOperator
    from torchrl.objectives import IQLLoss

    algorithm = make(num_critics=1)
    with torch.no_grad():  # torchrl's target has the critic's own weights
        for target, own in zip(algorithm.target.parameters(), algorithm.critics.parameters()):
            target.copy_(own)

    class Parameters(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = algorithm.policy

        def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, log_std = self.policy(obs).chunk(2, -1)
            return mean, log_std.exp()

    class Value(torch.nn.Module):
        def __init__(self, critics: Any):
            super().__init__()
            self.critics = critics

        def forward(self, *seen: torch.Tensor) -> torch.Tensor:
            return self.critics(*seen)[0]

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=TanhNormal,
            distribution_kwargs={"tanh_loc": False},
        ),
    )  # fmt: skip
    theirs = IQLLoss(
        actor, ValueOperator(Value(algorithm.critics), in_keys=["observation", "action"]),
        ValueOperator(Value(algorithm.state_value), in_keys=["observation"]),
        num_qvalue_nets=1, loss_function="l2", temperature=3.0, expectile=0.7,
    )  # fmt: skip
    theirs.make_value_estimator(gamma=0.9)
    for parameters in (theirs.qvalue_network_params, theirs.target_qvalue_network_params):
        for name, own in algorithm.critics.named_parameters():
            found = parameters.flatten_keys(".")
            (key,) = [key for key in found.keys() if key.endswith(f"critics.{name}")]  # noqa: SIM118
            found[key].data.copy_(own.data.expand_as(found[key]))
    batch = minibatch()
    data = batch.select("observation", "action", "next").clone()
    for key in ("reward", "terminated"):
        data["next", key] = data["next", key][:, None]
    data["next", "done"] = data["next", "terminated"]
    found = theirs(data)
    metrics, _ = one_update(algorithm, batch)
    torch.testing.assert_close(metrics["loss/state_value"], found["loss_value"].detach())
    torch.testing.assert_close(metrics["loss/policy"], found["loss_actor"].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(2 * metrics["loss/value"], found["loss_qvalue"].detach())


def test_the_expectile_of_numbers() -> None:
    """Numbers 0 and 1, the latter in 3 of 10: the expectile 0.7 is 0.5, the expectile 0.5 their mean."""
    numbers = torch.tensor([1.0] * 3 + [0.0] * 7)
    for expectile, expected in ((0.5, 0.3), (0.7, 0.5), (0.3, 0.1552)):
        value = torch.tensor(0.4, requires_grad=True)
        for _ in range(200):
            (gradient,) = torch.autograd.grad(expectile_loss(numbers - value, expectile).mean(), value)
            value = (value - 0.5 * gradient).detach().requires_grad_()
        assert value.item() == pytest.approx(expected, abs=1e-3)


def test_the_target_critics_follow_and_values_do_not() -> None:
    algorithm = make(tau=0.25)
    before = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
    one_update(algorithm, minibatch())
    for name, tensor in algorithm.state_dict().items():
        own = before.get(name.replace("target.", "critics."))
        expected = 0.75 * before[name] + 0.25 * own if name.startswith("target.") else before[name]
        torch.testing.assert_close(tensor, expected)


def test_the_policys_learning_rate_falls_as_a_cosine_and_the_others_stay() -> None:
    algorithm = IQL(spec=BOX, network=SMALL, critic_hidden_sizes=[32], lr=1e-3, actor_lr=1e-2, value_lr=1e-4)
    seen: list[list[float]] = []
    follow = algorithm.follow_schedules

    def note() -> None:
        follow()
        if algorithm._host is not None:
            seen.append([group["lr"] for group in algorithm._host.param_groups])

    algorithm.follow_schedules = note
    rows = minibatch(60)
    trainer = learn(algorithm, rows, 50)
    assert trainer.global_step == 50
    assert seen[0] == pytest.approx([1e-2, 1e-3, 1e-4]) and seen[-1] == pytest.approx([0.0, 1e-3, 1e-4])
    algorithm.updates.fill_(25)
    algorithm.follow_schedules()
    assert seen[-1][0] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi / 2)))
    constant = IQL(spec=BOX, network=SMALL, actor_lr_schedule="constant")
    constant.configure_model()
    assert [group["lr_scale"] for group in constant.configure_optimizers().param_groups] == [1.0, 1.0, 1.0]


def test_a_schedule_to_the_end_needs_an_end() -> None:
    class Endless(Drawn):
        budget = None

    from helpers import quiet_trainer

    with pytest.raises(OptionError, match="actor_lr_schedule='cosine': expected a budget to end at"):
        quiet_trainer(max_epochs=1).fit(IQL(spec=BOX), Endless(minibatch(60), 1))


@pytest.mark.parametrize("network", [GRUNetwork, LSTMNetwork])
@pytest.mark.parametrize("spec", [BOX, DISCRETE])
def test_padding_changes_nothing(spec: dict, network: type) -> None:
    algorithm = IQL(spec=spec, network=network, critic_hidden_sizes=[32])
    algorithm.configure_model()
    check_padding(algorithm, torch.randint(3, (2, 4)) if spec is DISCRETE else torch.rand(2, 4, 2))


def test_masked_rows_may_hold_anything() -> None:
    found = []
    for junk in (0.0, 1e4):
        batch = minibatch(mask=torch.tensor([True, True, True, True, False, False]))
        batch["observation"][4:] += junk
        batch["next", "reward"][4:] += junk
        found.append(one_update(make(), batch))
    for first, second in zip(*found):
        for name in first:
            torch.testing.assert_close(first[name], second[name], msg=name)


def test_held_out_rows_are_judged() -> None:
    algorithm, batch = make(), minibatch()
    found = algorithm.judge(batch)
    with torch.no_grad():
        q = algorithm.critics(batch["observation"], batch["action"]).mean(0)[:, 0]
        value = algorithm.state_value(batch["observation"])[0, :, 0]
        greedy = torch.tanh(algorithm.policy(batch["observation"])[:, :2])
        td_error = (q - algorithm.value_target(batch, None)).abs()
    torch.testing.assert_close(found["td_error"], td_error)
    torch.testing.assert_close(found["initial_value"], value[::2])
    difference = (greedy - batch["action"]).abs().mean(-1)
    torch.testing.assert_close(found["action_difference"], difference, atol=1e-5, rtol=0)


# --- what is learned ------------------------------------------------------------------------------------------------


def test_the_better_recorded_action_is_preferred_as_far_as_the_weights_say() -> None:
    spec = EnvSpec("Test", STATES, spaces.Discrete(2)).to_dict()
    algorithm = IQL(lr=1e-2, tau=0.1, spec=spec, network=SMALL, critic_hidden_sizes=[32], actor_lr_schedule="constant")
    learn(algorithm, bandit(), 400)
    # Q = 1 and 0, V = 0.5 (see above), weights e^1.5 and e^-1.5 of shares 0.3 and 0.7
    good, bad = 0.3 * math.exp(1.5), 0.7 * math.exp(-1.5)
    probs = torch.softmax(algorithm.policy(torch.eye(2)), -1).diagonal()
    assert probs.mean().item() == pytest.approx(good / (good + bad), abs=0.08)  # 0.9
    value = algorithm.state_value(torch.eye(2)).mean().item()
    assert value == pytest.approx(0.5, abs=0.12)
    shuffled = IQL(lr=1e-2, tau=0.1, spec=spec, network=SMALL, critic_hidden_sizes=[32], actor_lr_schedule="constant")
    learn(shuffled, bandit(shuffled=True), 300)
    assert torch.softmax(shuffled.policy(torch.eye(2)), -1).diagonal().mean() < 0.5  # no better than imitation, 0.3


def test_continuous_actions_move_to_the_better_recorded_ones() -> None:
    spec = EnvSpec("Test", STATES, spaces.Box(-1, 1, (1,), np.float32)).to_dict()
    algorithm = IQL(lr=5e-3, tau=0.1, spec=spec, network=SMALL, critic_hidden_sizes=[32], actor_lr_schedule="constant")
    learn(algorithm, bandit(continuous=True), 400)
    action = algorithm.policy.act(np.eye(2, dtype=np.float32))[0][:, 0]
    assert action[0] < -0.2 and action[1] > 0.2  # imitation gives 0.2 and -0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expectile": 1.0}, "expectile=1.0: expected a number, above 0 and below 1"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"max_weight": 0.0}, "max_weight=0.0"),
        ({"value_lr": 0.0}, "value_lr=0.0"),
        ({"actor_lr_schedule": "square"}, "actor_lr_schedule='square'"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        IQL(**options)
    assert message in str(error.value)


def test_other_action_spaces_are_refused_with_the_way_out() -> None:
    spec = EnvSpec("Test", OBS, spaces.MultiDiscrete([2, 2]))
    with pytest.raises(SpaceError, match=r"IQL needs a Box or Discrete action space, got MultiDiscrete.*Use MARWIL"):
        IQL(spec=spec.to_dict()).configure_model()
