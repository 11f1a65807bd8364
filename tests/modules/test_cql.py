"""CQL and DiscreteCQL: the conservative loss by an independent computation, and what it does to actions nobody took."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import check_padding
from recorded import bandit, learn, one_update
from scipy.special import logsumexp
from tensordict import TensorDict

from lit_rl import BC, CQL, MLP, SAC, DiscreteCQL, GRUNetwork, LSTMNetwork
from lit_rl.errors import OptionError, SpaceError
from lit_rl.spec import EnvSpec

OBS = spaces.Box(-1, 1, (3,), np.float32)
BOX = EnvSpec("Test", OBS, spaces.Box(-2, 4, (2,), np.float32)).to_dict()
DISCRETE = EnvSpec("Test", OBS, spaces.Discrete(3)).to_dict()
STATES = spaces.Box(0, 1, (2,), np.float32)
ARM = EnvSpec("Test", STATES, spaces.Box(-1, 1, (1,), np.float32)).to_dict()
SMALL = functools.partial(MLP, hidden_sizes=[32], activation="relu")


def make(kind: type = CQL, spec: dict = BOX, **options: Any) -> Any:
    torch.manual_seed(0)
    own = {} if kind is DiscreteCQL else {"critic_hidden_sizes": [32]}
    algorithm = kind(spec=spec, network=SMALL, **own | options)
    algorithm.configure_model()
    algorithm.generator.manual_seed(0)
    return algorithm


def minibatch(num: int = 6, discrete: bool = False, **more: Any) -> TensorDict:
    """Rows of which every third was terminated; the others go on, be it that they were truncated."""
    g = torch.Generator().manual_seed(0)
    action = torch.randint(3, (num,), generator=g) if discrete else torch.rand(num, 2, generator=g) * 2 - 1
    return TensorDict(
        {
            "observation": torch.randn(num, 3, generator=g), "action": action, "discount": torch.full((num,), 0.9),
            "is_init": torch.arange(num) % 2 == 0, "return_to_go": torch.tensor([2.0, -2.0] * (num // 2)),
            "to_go_discount": torch.tensor([0.0, 0.5, 0.5] * (num // 3)),
            "to_go_observation": torch.randn(num, 3, generator=g),
            "next": {
                "observation": torch.randn(num, 3, generator=g), "reward": torch.randn(num, generator=g),
                "terminated": torch.arange(num) % 3 == 0,
            },
            **more,
        },
        [num],
    )  # fmt: skip


def gaps_by_numpy(algorithm: CQL, batch: TensorDict, temperature: float = 1.0, bound: Any = None) -> np.ndarray:
    """The gap of each critic and row, [K, M], as CORL and d3rlpy have it, with the noise that the batch holds.

    One critic's value after the other is asked for, of one action at one state; the rest is numpy.
    """
    distribution, num = algorithm.policy.distribution, algorithm.hp.num_actions

    def q(k: int, row: int, action: np.ndarray) -> float:
        obs = batch["observation"][row : row + 1]  # always s
        return float(algorithm.critics(obs, torch.tensor(action, dtype=torch.float32)[None])[k, 0, 0])

    def density(parameters: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, float]:
        mean, log_std = parameters[:2], np.clip(parameters[2:], -20, 2)
        u = mean + np.exp(log_std) * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        return np.tanh(u), float((log_normal - np.log(1 - np.tanh(u) ** 2)).sum())

    found = np.zeros((2, len(batch)))
    with torch.no_grad():
        here = algorithm.policy(batch["observation"]).double().numpy()
        there = algorithm.policy(batch["next", "observation"]).double().numpy()
        for row in range(len(batch)):
            drawn = [(batch["uniform_action"][row, i].numpy(), 2 * math.log(0.5)) for i in range(num)]
            for parameters, key in ((here, "several_noise"), (there, "several_next_noise")):
                drawn += [density(parameters[row], batch[key][row, i].double().numpy()) for i in range(num)]
            for k in range(2):
                values = np.array([q(k, row, action) for action, _ in drawn])
                if bound is not None:
                    values[num:] = np.maximum(values[num:], bound[row])
                soft = temperature * logsumexp((values - [log_density for _, log_density in drawn]) / temperature)
                found[k, row] = soft - q(k, row, batch["action"][row].numpy())
    assert distribution.num_outputs == 2
    return found


# --- by an independent computation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gap_is_that_of_an_independent_computation(temperature: float) -> None:
    algorithm, batch = make(num_actions=4, temperature=temperature), minibatch()
    metrics, _ = one_update(algorithm, batch)
    assert batch["uniform_action"].shape == (6, 4, 2) and batch["uniform_action"].abs().max() <= 1
    expected = gaps_by_numpy(make(num_actions=4), batch, temperature)
    assert metrics["cql/gap"].item() == pytest.approx(expected.mean(), rel=1e-4)


def test_calibrated_values_of_the_policys_actions_are_at_least_the_return() -> None:
    algorithm, batch = make(num_actions=4, calibrated=True), minibatch()
    with torch.no_grad():
        final = batch["to_go_observation"]
        last = algorithm.target(final, torch.tanh(algorithm.policy(final)[:, :2])).amin(0)[:, 0]
    bound = (batch["return_to_go"] + batch["to_go_discount"] * last).numpy()  # bootstrapped where it was truncated
    metrics, _ = one_update(algorithm, batch)
    expected = gaps_by_numpy(make(num_actions=4), batch, bound=bound)
    assert metrics["cql/gap"].item() == pytest.approx(expected.mean(), rel=1e-4)
    assert (bound > 0.5).any() and (bound < -0.5).any()  # so that the bound matters in some rows, and not in others


def test_the_critics_gradient_is_that_of_their_two_losses_and_nothing_reaches_the_actions() -> None:
    algorithm, batch = make(min_q_weight=3.0), minibatch()
    _, gradients = one_update(algorithm, batch)
    fresh = make(min_q_weight=3.0)
    obs, alpha = batch["observation"], torch.tensor(1.0)
    with torch.no_grad():
        next_action, _ = fresh.sample(fresh.policy(batch["next", "observation"]), batch["next_noise"])
        next_q = fresh.target(batch["next", "observation"], next_action).amin(0)[:, 0]
        target = batch["next", "reward"] + 0.9 * (torch.arange(6) % 3 != 0) * next_q  # without an entropy bonus
        actions, density = fresh.drawn_actions(batch, fresh.policy.features(batch), fresh.policy.encoder(
            batch["next", "observation"]
        ))  # fmt: skip
    q = fresh.critics(obs, batch["action"])[..., 0]
    repeated = fresh.critics(obs[:, None].expand(6, 30, 3), actions)[..., 0]
    loss = 0.5 * (q - target).square().sum(0) + 3 * (torch.logsumexp(repeated - density, -1) - q).sum(0)
    names, parameters = zip(*fresh.critics.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(loss.mean(), parameters)):
        torch.testing.assert_close(gradients[f"critics.{name}"], gradient, atol=1e-5, rtol=1e-4)
    action, log_prob = fresh.sample(fresh.policy(obs), batch["noise"])
    actor = (alpha * log_prob - fresh.critics(obs, action, frozen=True).amin(0)[:, 0]).mean()
    names, parameters = zip(*fresh.policy.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(actor, parameters)):
        torch.testing.assert_close(gradients[f"policy.{name}"], gradient, atol=1e-5, rtol=1e-4)


def test_truncated_rows_are_bootstrapped_and_terminated_ones_are_not() -> None:
    algorithm, batch = make(), minibatch()
    algorithm.draw_noise(batch)
    next_feature = algorithm.policy.encoder(batch["next", "observation"])
    with torch.no_grad():
        found = algorithm.value_target(batch, next_feature, torch.tensor(5.0))[:, 0]
        action, _ = algorithm.sample(algorithm.policy(batch["next", "observation"]), batch["next_noise"])
        q = algorithm.target(batch["next", "observation"], action)[..., 0]
    for row in range(6):
        value = min(q[0, row], q[1, row]) if row % 3 else 0.0
        torch.testing.assert_close(found[row], batch["next", "reward"][row] + 0.9 * value)


def test_the_policy_imitates_in_the_first_updates() -> None:
    algorithm, batch = make(bc_iters=2, initial_alpha=0.5), minibatch()
    batch["action"][0] = 1.0  # whose log-probability would be infinite
    metrics, gradients = one_update(algorithm, batch)
    fresh = make()
    parameters = fresh.policy(batch["observation"])
    _, log_prob = fresh.sample(parameters, batch["noise"])
    inside = batch["action"].clamp(-1 + 1e-5, 1 - 1e-5)
    loss = (0.5 * log_prob - fresh.policy.distribution.evaluate(parameters, inside)[0]).mean()
    assert metrics["loss/policy"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(
        gradients["policy.head.weight"], torch.autograd.grad(loss, fresh.policy.head.weight)[0], atol=1e-5, rtol=1e-4
    )
    algorithm.updates.fill_(2)
    batch = minibatch()
    assert one_update(algorithm, batch)[0]["loss/policy"] != metrics["loss/policy"] and "imitates" not in batch.keys()  # noqa: SIM118


@pytest.mark.parametrize(("threshold", "rises"), [(-100.0, True), (100.0, False)])
def test_a_learned_weight_rises_while_the_gap_is_above_its_threshold(threshold: float, rises: bool) -> None:
    options = {"lagrangian": True, "min_q_weight": 2.0}
    algorithm = make(lagrangian_thresh=threshold, **options)
    metrics, gradients = one_update(algorithm, minibatch())
    gap = metrics["cql/gap"].item()
    assert gradients["log_weight"].item() == pytest.approx(-2.0 * (gap - threshold), rel=1e-4)
    assert (gradients["log_weight"] < 0) == rises and metrics["cql/weight"] == pytest.approx(2.0)
    plain = one_update(make(min_q_weight=2.0), minibatch())[1]
    for name, gradient in plain.items():  # everything else learns with the weight as it is
        torch.testing.assert_close(gradients[name], gradient)
    with torch.no_grad():
        algorithm.log_weight.fill_(50.0)
    assert one_update(algorithm, minibatch())[0]["cql/weight"] == pytest.approx(1e6, rel=1e-4)
    groups = algorithm.configure_optimizers().param_groups
    assert any(p is algorithm.log_weight for group in groups for p in group["params"])


def test_the_policy_learns_slower_than_the_critics() -> None:
    groups = make().configure_optimizers().param_groups
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    algorithm = make()
    assert algorithm.hp.actor_lr == 1e-4 and min(rates.values()) == pytest.approx(1 / 3) and max(rates.values()) == 1


def test_discrete_losses_are_torchrls() -> None:
    from torchrl.data import OneHot  # noqa: F401  loads torchrl's data before its objectives
    from torchrl.modules import QValueActor
    from torchrl.objectives import DiscreteCQLLoss

    # The target network is as the network still is: theirs (0.14) bootstraps from the latter.
    algorithm = make(DiscreteCQL, DISCRETE, min_q_weight=2.0)
    theirs = DiscreteCQLLoss(
        QValueActor(_Values(algorithm.policy), in_keys=["observation"], action_space="categorical"),
        loss_function="l2", delay_value=True, action_space="categorical",
    )  # fmt: skip
    theirs.make_value_estimator(gamma=0.9)
    batch = minibatch(discrete=True)
    data = batch.select("observation", "action", "next").clone()
    for key in ("reward", "terminated"):
        data["next", key] = data["next", key][:, None]
    data["next", "done"] = data["next", "terminated"]
    found = theirs(data)
    loss, (_, terms) = algorithm.loss(batch)
    torch.testing.assert_close(terms[3], found["loss_cql"].detach())
    torch.testing.assert_close(terms[0], found["loss_qvalue"].detach())
    torch.testing.assert_close(loss, found["loss_qvalue"] + 2.0 * found["loss_cql"])


class _Values(torch.nn.Module):
    """The values of all actions."""

    def __init__(self, policy: Any):
        super().__init__()
        self.encoder, self.head = policy.encoder, policy.head

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(obs))


@pytest.mark.parametrize("options", [{}, {"dueling": True}, {"distributional": "quantile", "num_atoms": 5}])
def test_the_discrete_gap_is_over_legal_actions(options: dict) -> None:
    space = spaces.Dict(observation=OBS, action_mask=spaces.MultiBinary(3))
    algorithm = make(DiscreteCQL, EnvSpec("Test", space, spaces.Discrete(3)).to_dict(), **options)
    batch = minibatch(discrete=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]] * 3)
    batch["action"] = torch.tensor([0, 2, 1, 0, 0, 1])
    for tree in (batch, batch["next"]):
        tree["observation"] = {"observation": tree["observation"], "action_mask": mask}
    metrics, _ = one_update(algorithm, batch)
    with torch.no_grad():
        q = algorithm.policy.expectation(algorithm.policy.distributions(algorithm.policy.features(batch))).numpy()
    expected = [
        logsumexp([q[row, a] for a in range(3) if mask[row, a]]) - q[row, batch["action"][row]] for row in range(6)
    ]
    assert metrics["cql/gap"].item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("network", [GRUNetwork, LSTMNetwork])
@pytest.mark.parametrize("kind", [CQL, DiscreteCQL])
def test_padding_changes_nothing(kind: type, network: type) -> None:
    spec = DISCRETE if kind is DiscreteCQL else BOX
    algorithm = kind(spec=spec, network=network)
    algorithm.configure_model()
    check_padding(algorithm, torch.randint(3, (2, 4)) if spec is DISCRETE else torch.rand(2, 4, 2))


def test_masked_rows_may_hold_anything() -> None:
    found = []
    for junk in (0.0, 1e4):
        batch = minibatch(mask=torch.tensor([True, True, True, True, False, False]))
        batch["observation"][4:] += junk
        batch["next", "reward"][4:] += junk
        batch["return_to_go"][4:] += junk
        found.append(one_update(make(calibrated=True, lagrangian=True), batch))
    for first, second in zip(*found):
        for name in first:
            torch.testing.assert_close(first[name], second[name], msg=name)


def test_held_out_rows_are_judged_without_numbers_that_training_would_draw() -> None:
    for algorithm, batch in (
        (make(), minibatch()),
        (make(DiscreteCQL, DISCRETE), minibatch(discrete=True)),
        (make(SAC, DISCRETE), minibatch(discrete=True)),
        (make(DiscreteCQL, DISCRETE, noisy=True), minibatch(discrete=True)),
    ):
        before = algorithm.generator.get_state(), torch.get_rng_state()
        found = algorithm.judge(batch.clone())
        assert {name: len(x) for name, x in found.items()} == {
            "td_error": 6, "initial_value": 3, "action_difference": 6
        }  # fmt: skip
        again = algorithm.judge(batch.clone())
        for name in found:
            torch.testing.assert_close(found[name], again[name])
        assert all(map(torch.equal, before, (algorithm.generator.get_state(), torch.get_rng_state())))
    greedy = torch.tanh(make().policy(minibatch()["observation"])[:, :2])
    difference = (greedy - minibatch()["action"]).abs().mean(-1)
    torch.testing.assert_close(make().judge(minibatch())["action_difference"], difference.detach(), atol=1e-5, rtol=0)


# --- what is learned ------------------------------------------------------------------------------------------------


def test_actions_that_nobody_took_are_worth_less() -> None:
    """Three actions, of which two were taken: without the conservative loss the third's value is anything."""
    spec = EnvSpec("Test", STATES, spaces.Discrete(3)).to_dict()
    options = {"lr": 1e-2, "spec": spec, "network": SMALL}
    algorithm = DiscreteCQL(min_q_weight=0.1, **options)
    learn(algorithm, bandit(), 300)
    q = algorithm.policy(torch.eye(2)).detach()
    assert (q.argmax(-1) == torch.tensor([0, 1])).all()
    assert (q[:, 2] < q[:, :2].amin(-1) - 0.5).all()
    assert q.diagonal().mean() == pytest.approx(1.0, abs=0.35) and q.flip(0).diagonal().mean() < 0.5


def test_values_of_unseen_actions_lie_below_and_the_policy_prefers_the_better_recorded_one() -> None:
    options: dict[str, Any] = {"critic_hidden_sizes": [32], "network": SMALL, "spec": ARM}
    algorithm = CQL(lr=3e-3, actor_lr=3e-3, min_q_weight=0.2, num_actions=4, **options)
    learn(algorithm, bandit(continuous=True), 400)
    obs = torch.eye(2)
    with torch.no_grad():
        q = {a: algorithm.critics(obs, torch.full((2, 1), a)).mean(0)[:, 0] for a in (-0.95, -0.5, 0.0, 0.5, 0.95)}
    for seen, beyond in ((0.5, 0.95), (-0.5, -0.95)):
        assert (q[beyond] < q[seen]).all()
    assert q[0.5][1] > q[-0.5][1] and q[-0.5][0] > q[0.5][0]
    action = algorithm.policy.act(np.eye(2, dtype=np.float32))[0][:, 0]
    assert action[0] < -0.2 and action[1] > 0.2


def test_rewards_that_say_nothing_leave_no_preference_for_the_better_action() -> None:
    rows = bandit(shuffled=True)
    spec = EnvSpec("Test", STATES, spaces.Discrete(2)).to_dict()
    algorithm, clone = DiscreteCQL(lr=1e-2, spec=spec, network=SMALL), BC(lr=1e-2, spec=spec, network=SMALL)
    learn(algorithm, rows, 200)
    learn(clone, rows, 200)
    q = algorithm.policy(torch.eye(2)).detach()
    assert (q.argmax(-1) != torch.tensor([0, 1])).all()  # the one that was taken more often, as imitation has it
    assert (clone.policy(torch.eye(2)).argmax(-1) == q.argmax(-1)).all()


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: CQL(spec=DISCRETE),
            SpaceError,
            "CQL needs a Box action space, got Discrete(3) from env 'Test'. Use D",
        ),
        (lambda: DiscreteCQL(spec=BOX), SpaceError, "DiscreteCQL needs a Discrete action space, got Box"),
        (
            lambda: CQL(spec=BOX, calibrated=True, network=LSTMNetwork),
            OptionError,
            "calibrated=True: LSTMNetwork has m",
        ),
        (lambda: CQL(spec=BOX, num_actions=0), OptionError, "num_actions=0"),
        (lambda: CQL(spec=BOX, temperature=0), OptionError, "temperature=0"),
        (lambda: DiscreteCQL(spec=DISCRETE, min_q_weight=-1.0), OptionError, "min_q_weight=-1.0"),
    ],
)
def test_options_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make().configure_model()
    assert message in str(raised.value)


def test_only_calibration_needs_returns() -> None:
    assert CQL(calibrated=True).wants_returns_to_go and not CQL().wants_returns_to_go
