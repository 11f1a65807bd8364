"""BC and MARWIL: weights and returns by hand, and what they learn from recorded actions."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from recorded import bandit, learn, one_update
from tensordict import TensorDict

from lit_rl import BC, MARWIL, MLP, GRUNetwork, LSTMNetwork, MultiAgent
from lit_rl.errors import OptionError
from lit_rl.spec import EnvSpec, MultiAgentSpec

OBS = spaces.Box(-1, 1, (2,), np.float32)
DISCRETE = EnvSpec("Test", OBS, spaces.Discrete(2)).to_dict()
BOX = EnvSpec("Test", OBS, spaces.Box(-2, 4, (2,), np.float32)).to_dict()
SMALL = functools.partial(MLP, hidden_sizes=[32])


class Sum(torch.nn.Module):
    """The sum of an observation's numbers."""

    output_size = 1

    def __init__(self, observation_space: Any):
        super().__init__()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.sum(-1, keepdim=True)


def by_hand(**options: Any) -> MARWIL:
    """MARWIL whose critic gives the sum of an observation, and whose policy is uniform."""
    algorithm = MARWIL(spec=DISCRETE, network=Sum, normalize_values=False, **options)
    algorithm.configure_model()
    with torch.no_grad():
        for layer, weight in ((algorithm.critic.head.linear, 1.0), (algorithm.policy.head, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    return algorithm


def episode(**more: Any) -> TensorDict:
    """Rows of three episodes, by hand with gamma 0.5: two of one that terminates, two of one that is truncated, one.

    Rewards 1, 2 | 1, 1 and then V = 4 | -3.
    """
    obs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    return TensorDict(
        {
            "observation": obs, "action": torch.tensor([0, 1, 0, 1, 0]),
            "return_to_go": torch.tensor([2.0, 2.0, 1.5, 1.0, -3.0]),
            "to_go_discount": torch.tensor([0.0, 0.0, 0.25, 0.5, 0.0]),
            "to_go_observation": torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, 3.0], [1.0, 3.0], [9.0, 9.0]]),
            "is_init": torch.tensor([True, False, True, False, True]),
            "next": {"reward": torch.tensor([1.0, 2.0, 1.0, 1.0, -3.0])},
            **more,
        },
        [5],
    )  # fmt: skip


TARGET = [2.0, 2.0, 1.5 + 0.25 * 4, 1.0 + 0.5 * 4, -3.0]
ADVANTAGE = np.array([2.0 - 1, 2.0 - 1, 2.5 - 2, 3.0 - 0, -3.0 - 1])
SQUARE = float((ADVANTAGE**2).mean())


# --- by hand --------------------------------------------------------------------------------------------------------


def test_returns_are_bootstrapped_where_the_episode_was_truncated_alone() -> None:
    batch = episode()
    one_update(by_hand(), batch)
    torch.testing.assert_close(batch["value_target"], torch.tensor(TARGET))


@pytest.mark.parametrize(("beta", "bound"), [(1.0, 20.0), (2.0, 20.0), (1.0, 1.5)])
def test_weights_are_those_of_the_advantages_over_their_size_and_bounded(beta: float, bound: float) -> None:
    batch, algorithm = episode(), by_hand(beta=beta, max_weight=bound)
    metrics, gradients = one_update(algorithm, batch)
    weight = np.minimum(np.exp(beta * ADVANTAGE / math.sqrt(SQUARE)), bound)
    np.testing.assert_allclose(batch["imitation_weight"], weight, rtol=1e-5)
    assert (weight == bound).any() == (bound == 1.5)
    assert metrics["imitation/weight"].item() == pytest.approx(weight.mean(), rel=1e-5)
    assert metrics["loss/policy"].item() == pytest.approx(weight.mean() * math.log(2), rel=1e-5)
    assert metrics["loss/value"].item() == pytest.approx(0.5 * SQUARE, rel=1e-5)
    # The policy's gradient: sum_i w_i (pi - 1{a = a_i}) x_i / M, for the logits' layer, of features x = sum of obs.
    x, action = np.array([1.0, 1.0, 2.0, 0.0, 1.0]), np.array([0, 1, 0, 1, 0])
    expected = [(weight * x * (0.5 - (action == a))).mean() for a in range(2)]
    np.testing.assert_allclose(gradients["policy.head.weight"][:, 0], expected, rtol=1e-4)


def test_a_huge_advantage_gives_the_greatest_weight_not_infinity() -> None:
    batch = episode()
    batch["return_to_go"][0] = 1e6
    algorithm = by_hand(beta=1e6)
    one_update(algorithm, batch)
    assert batch["imitation_weight"][0] == pytest.approx(20.0)


def test_advantages_have_no_gradient() -> None:
    """The critic's gradient is that of its own loss: the weights, which its values made, pass none on."""
    algorithm, batch = by_hand(), episode()
    _, gradients = one_update(algorithm, batch)
    x = np.array([1.0, 1.0, 2.0, 0.0, 1.0])
    assert gradients["critic.head.linear.weight"].item() == pytest.approx(-(ADVANTAGE * x).mean(), rel=1e-5)
    assert gradients["critic.head.linear.bias"].item() == pytest.approx(-ADVANTAGE.mean(), rel=1e-5)
    assert not batch["value_target"].requires_grad and not batch["imitation_weight"].requires_grad


def test_the_size_of_advantages_is_updated_before_it_is_used() -> None:
    algorithm = by_hand(moving_average_sqd_adv_norm_update_rate=0.25)
    one_update(algorithm, episode())
    assert algorithm.squared_advantage.item() == pytest.approx(SQUARE)  # the first minibatch makes all of it
    algorithm.updates.fill_(9)
    batch = episode()
    batch["return_to_go"] += 2.0
    advantage = ADVANTAGE + 2
    metrics, _ = one_update(algorithm, batch)
    squared = 0.75 * SQUARE + 0.25 * (advantage**2).mean()
    assert metrics["imitation/squared_advantage"].item() == pytest.approx(squared, rel=1e-6)
    weight = np.minimum(np.exp(advantage / math.sqrt(squared)), 20)
    np.testing.assert_allclose(batch["imitation_weight"], weight, rtol=1e-5)


def test_the_size_of_advantages_is_their_mean_until_the_moving_average_is_as_long() -> None:
    algorithm, seen = by_hand(), []
    for n in range(3):
        batch = episode()
        batch["return_to_go"] += n
        seen.append(((ADVANTAGE + n) ** 2).mean())
        one_update(algorithm, batch)
        algorithm.updates += 1
        assert algorithm.squared_advantage.item() == pytest.approx(np.mean(seen), rel=1e-5)


def test_a_return_that_is_not_finite_leaves_the_size_of_advantages() -> None:
    algorithm, batch = by_hand(), episode()
    one_update(algorithm, episode())
    batch["return_to_go"][0] = torch.nan
    one_update(algorithm, batch)
    assert algorithm.squared_advantage.item() == pytest.approx(SQUARE)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_rows_that_are_masked_may_hold_anything(beta: float) -> None:
    options = {"network": Sum} | ({"normalize_values": True} if beta else {})
    found = []
    for junk in (0.0, 1e6):
        algorithm = MARWIL(spec=DISCRETE, beta=beta, normalize_observations=True, **options)
        torch.manual_seed(0)
        algorithm.configure_model()
        batch = episode(mask=torch.tensor([True, True, True, False, False]))
        for key in ("observation", "return_to_go", "to_go_observation"):
            batch[key][3:] += junk
        metrics, gradients = one_update(algorithm, batch)
        metrics |= {name: buffer for name, buffer in algorithm.named_buffers() if buffer.is_floating_point()}
        found.append({**metrics, **gradients})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


@pytest.mark.parametrize("network", [GRUNetwork, LSTMNetwork])
def test_sequences_are_imitated_without_their_padding(network: type) -> None:
    def sequences(junk: float) -> TensorDict:
        g = torch.Generator().manual_seed(0)
        mask = torch.tensor([[True, True, False, False], [True] * 4])
        obs = torch.randn(2, 4, 2, generator=g)
        batch = {"observation": obs + junk * ~mask[..., None], "action": torch.randint(2, (2, 4), generator=g)}
        state = {name: torch.zeros(2, 64) for name in network.STATE}
        more = {"is_init": torch.zeros(2, 4, dtype=torch.bool), "mask": mask, "state": state}
        return TensorDict({**batch, **more, "next": {"reward": torch.zeros(2, 4)}}, [2])

    torch.manual_seed(0)
    algorithm = BC(spec=DISCRETE, network=network)
    algorithm.configure_model()
    found = [one_update(algorithm, sequences(junk)) for junk in (0.0, 50.0)]
    batch = sequences(0.0)
    log_prob = algorithm.policy.evaluate(batch)[0]
    assert found[0][0]["policy/log_prob"].item() == pytest.approx(log_prob[batch["mask"]].mean().item(), rel=1e-5)
    for name in found[0][1]:
        torch.testing.assert_close(found[0][1][name], found[1][1][name])
    judged = algorithm.judge(batch)
    assert judged["log_prob"].shape == judged["action_difference"].shape == (6,)
    torch.testing.assert_close(judged["log_prob"], log_prob[batch["mask"]])


def test_the_loss_of_imitation_is_torchrls() -> None:
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.data import OneHot  # noqa: F401  loads torchrl's data before its objectives
    from torchrl.objectives import BCLoss

    algorithm = BC(spec=BOX, network=SMALL, log_std_init=-0.5)
    algorithm.configure_model()
    g = torch.Generator().manual_seed(0)
    batch = TensorDict({"observation": torch.randn(8, 2, generator=g), "action": torch.randn(8, 2, generator=g)}, [8])

    class Parameters(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = algorithm.policy

        def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, log_std = self.policy(obs).chunk(2, -1)
            return mean, log_std.exp()

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=lambda loc, scale: torch.distributions.Independent(
                torch.distributions.Normal(loc, scale), 1
            ),
        ),
    )
    theirs = BCLoss(actor)(batch.clone())["loss_bc"]
    batch["next"] = {"reward": torch.zeros(8)}
    torch.testing.assert_close(algorithm.loss(batch)[0], theirs)


def test_held_out_rows_are_judged() -> None:
    algorithm, batch = by_hand(), episode()
    with torch.no_grad():
        algorithm.policy.head.bias.copy_(torch.tensor([1.0, 0.0]))
    found = algorithm.judge(batch)
    np.testing.assert_allclose(found["td_error"], np.abs(ADVANTAGE), rtol=1e-6)
    np.testing.assert_allclose(found["initial_value"], [1.0, 2.0, 1.0])  # of the rows that begin an episode
    np.testing.assert_allclose(found["action_difference"], [0, 1, 0, 1, 0])
    log_probs = torch.log_softmax(torch.tensor([1.0, 0.0]), 0)
    torch.testing.assert_close(found["log_prob"], log_probs[batch["action"]])


def test_judging_draws_no_numbers_that_training_would() -> None:
    algorithm = BC(spec=BOX, network=SMALL, squash_actions=True)
    algorithm.configure_model()
    before = algorithm.generator.get_state(), torch.get_rng_state()
    batch = TensorDict({"observation": torch.randn(4, 2), "action": torch.rand(4, 2)}, [4])
    batch["is_init"] = torch.ones(4, dtype=torch.bool)
    before = algorithm.generator.get_state(), torch.get_rng_state()
    assert set(algorithm.judge(batch)) == {"log_prob", "action_difference"}
    assert all(map(torch.equal, before, (algorithm.generator.get_state(), torch.get_rng_state())))


def test_differences_of_actions_are_in_units_of_their_bounds() -> None:
    space = spaces.Dict(
        arm=spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32)), hand=spaces.Discrete(3)
    )
    algorithm = BC(spec=EnvSpec("Test", OBS, space).to_dict(), network=Sum)
    algorithm.configure_model()
    with torch.no_grad():
        algorithm.policy.head.weight.zero_()
        algorithm.policy.head.bias.copy_(torch.tensor([7.0, 5.0, 0.0, 1.0, 0.0]))  # an arm at (2, 5), clipped; hand 1
    action = {"arm": torch.tensor([[2.0, 5.0], [0.0, 0.0]]), "hand": torch.tensor([0, 1])}
    batch = TensorDict(
        {"observation": torch.zeros(2, 2), "action": action, "is_init": torch.ones(2, dtype=torch.bool)}, [2]
    )
    # arm: (|2 - 0| / 2 + |5 - 0| / 5) / 2 = 1
    torch.testing.assert_close(algorithm.judge(batch)["action_difference"], torch.tensor([0.5, 0.5]))


# --- what is learned ------------------------------------------------------------------------------------------------


def chosen(algorithm: Any, rows: TensorDict) -> float:
    """The mean probability of the good action."""
    probs = torch.softmax(algorithm.policy(torch.eye(2)), -1)
    return probs.diagonal().mean().item()


def test_imitation_reproduces_the_mixture_and_weights_prefer_the_better_action() -> None:
    rows = bandit()
    share = rows["next", "reward"].mean().item()
    cloned, weighted = BC(lr=1e-2, spec=DISCRETE), MARWIL(lr=1e-2, spec=DISCRETE)
    learn(cloned, rows, 200)
    learn(weighted, rows, 300)
    assert chosen(cloned, rows) == pytest.approx(share, abs=0.06)
    c = math.sqrt(share * (1 - share))
    good, bad = share * math.exp((1 - share) / c), (1 - share) * math.exp(-share / c)
    assert chosen(weighted, rows) == pytest.approx(good / (good + bad), abs=0.06)  # 0.79
    greedier = MARWIL(beta=3.0, lr=1e-2, spec=DISCRETE)
    learn(greedier, rows, 300)
    assert chosen(greedier, rows) > 0.9
    assert weighted.judge(rows)["td_error"].mean() == pytest.approx(2 * share * (1 - share), abs=0.06)


def test_weights_of_rewards_that_say_nothing_prefer_nothing() -> None:
    rows = bandit(shuffled=True)
    algorithm = MARWIL(lr=1e-2, spec=DISCRETE)
    learn(algorithm, rows, 300)
    assert chosen(algorithm, rows) < 0.42


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("depends", [False, True])
def test_continuous_actions_are_imitated(squash: bool, depends: bool) -> None:
    spec = EnvSpec("Test", OBS, spaces.Box(-1, 1, (1,), np.float32)).to_dict()
    algorithm = BC(lr=1e-2, spec=spec, network=SMALL, squash_actions=squash, state_dependent_std=depends)
    rows = bandit(good=1.0, continuous=True)
    learn(algorithm, rows, 200)
    found = algorithm.policy.act(np.eye(2, dtype=np.float32))[0][:, 0]
    np.testing.assert_allclose(found, [-0.5, 0.5], atol=0.06)
    assert algorithm.judge(rows)["log_prob"].mean() > 0.6  # the density of the noise, 0.1, has 0.88


def test_nested_actions_are_imitated() -> None:
    space = spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,), np.float32)])
    rows, arms = bandit(good=1.0), bandit(good=1.0, continuous=True)
    rows["action"] = {"0": rows["action"], "1": arms["action"]}
    algorithm = BC(lr=1e-2, spec=EnvSpec("Test", OBS, space).to_dict(), network=SMALL)
    learn(algorithm, rows, 200)
    choice, arm = algorithm.policy.act(np.array([0.0, 1.0], np.float32))[0]
    assert choice == 1 and arm[0] == pytest.approx(0.5, abs=0.06)


def test_illegal_actions_are_never_imitated() -> None:
    obs_space = spaces.Dict(observation=OBS, action_mask=spaces.MultiBinary(3))
    rows = bandit()
    rows["observation"] = {"observation": rows["observation"], "action_mask": torch.tensor([[1, 1, 0]]).expand(1000, 3)}
    algorithm = BC(lr=1e-2, spec=EnvSpec("Test", obs_space, spaces.Discrete(3)).to_dict(), network=SMALL)
    learn(algorithm, rows, 50)
    probs = torch.softmax(algorithm.policy(rows["observation"][:2]), -1)
    assert (probs[:, 2] == 0).all() and (probs[:, :2] > 0.2).all()
    assert algorithm.judge(rows)["log_prob"].isfinite().all()


def test_memory_is_imitated_by_sequences() -> None:
    """The recorded action is the observation before: without memory there is nothing better than a guess."""
    g = torch.Generator().manual_seed(0)
    seen = torch.randint(2, (500, 6), generator=g)
    action = torch.cat([torch.zeros(500, 1, dtype=torch.long), seen[:, :-1]], 1)
    is_init = torch.zeros(500, 6, dtype=torch.bool)
    is_init[:, 0] = True
    rows = TensorDict(
        {
            "observation": torch.nn.functional.one_hot(seen, 2).float(), "action": action, "is_init": is_init,
            "mask": torch.ones_like(is_init), "state": {"h": torch.zeros(500, 64), "c": torch.zeros(500, 64)},
            "next": {"reward": torch.zeros(500, 6)},
        },
        [500],
    )  # fmt: skip
    algorithm = BC(lr=1e-2, spec=DISCRETE, network=LSTMNetwork)
    learn(algorithm, rows, 150)
    assert algorithm.judge(rows)["action_difference"].mean() < 0.02


def test_statistics_of_observations_are_those_of_the_data() -> None:
    rows = bandit()
    rows["observation"] = rows["observation"] * 100 + 50
    algorithm = BC(lr=1e-2, spec=DISCRETE, normalize_observations=True)
    learn(algorithm, rows, 100)
    moments = next(iter(algorithm.policy.normalizer.moments.values()))
    torch.testing.assert_close(moments.mean, rows["observation"].mean(0), atol=2.0, rtol=0)
    torch.testing.assert_close(moments.var.sqrt(), rows["observation"].std(0), atol=2.0, rtol=0)
    assert chosen_scaled(algorithm, rows) == pytest.approx(0.3, abs=0.06)


def chosen_scaled(algorithm: Any, rows: TensorDict) -> float:
    return torch.softmax(algorithm.policy(100 * torch.eye(2) + 50), -1).diagonal().mean().item()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_critic_gives_returns_in_their_own_units(normalize: bool) -> None:
    rows = bandit(good=1.0)
    rows["return_to_go"] = 5000 + 1000 * rows["observation"][:, 0]
    algorithm = MARWIL(lr=1e-2, spec=DISCRETE, normalize_values=normalize)
    learn(algorithm, rows, 300)
    near = (algorithm.value(torch.eye(2), algorithm.critic) - torch.tensor([6000.0, 5000.0])).abs() < 200
    assert near.all() == normalize  # plain targets that great are out of Adam's reach


@pytest.mark.parametrize("options", [{"beta": 1.0, "normalize_values": True}, {"beta": 0.0, "squash_actions": True}])
def test_compiled_steps_give_the_weights_of_eager_ones(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which is run as it is written
    spec = EnvSpec("Test", OBS, spaces.Box(-1, 1, (1,), np.float32)).to_dict()
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        algorithm = MARWIL(lr=1e-2, spec=spec, network=SMALL, entropy_coef=0.01, compile=compile, **options)
        learn(algorithm, bandit(continuous=True), 20)
        found.append(algorithm.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("kinds", [(BC, BC), (BC, MARWIL)])
def test_policies_of_several_agents_learn_from_their_own_rows(kinds: tuple[type, type]) -> None:
    agent = EnvSpec("Test", OBS, spaces.Discrete(2))
    spec = MultiAgentSpec("Test", {"a": agent, "b": agent})
    first, second = (kind(lr=1e-2, network=SMALL) for kind in kinds)
    algorithm = MultiAgent({"a": first, "b": second}, spec=spec.to_dict())
    learn(algorithm, {"a": bandit(good=0.9), "b": bandit(good=0.3)}, 200)
    assert chosen(first, bandit()) == pytest.approx(0.9, abs=0.06)
    expected = 0.3 if kinds[1] is BC else 0.79
    assert chosen(second, bandit()) == pytest.approx(expected, abs=0.09)
    assert first.updates_done == second.updates_done == algorithm.updates_done == 200  # one update of all


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MARWIL(spec=DISCRETE, network=LSTMNetwork), "beta=1: LSTMNetwork has memory"),
        (lambda: MARWIL(spec=DISCRETE, critic_network=LSTMNetwork), "critic_network=LSTMNetwork: expected a network"),
        (lambda: MARWIL(spec=DISCRETE, squash_actions=True), "squash_actions=True: expected a Box action"),
        (lambda: BC(spec=DISCRETE, beta=0.5), "beta=0.5: expected 0 with BC. Use MARWIL."),
        (lambda: BC(spec=DISCRETE, value_coef=0.5), "value_coef=0.5: expected beta above 0"),
        (lambda: BC(spec=DISCRETE, critic_network=SMALL), "critic_network="),
        (lambda: MARWIL(spec=DISCRETE, beta=-1.0), "beta=-1.0: expected a number, at least 0"),
        (lambda: MARWIL(spec=DISCRETE, max_weight=0.0), "max_weight=0.0"),
        (lambda: BC(spec=DISCRETE, burn_in=2), "burn_in=2: expected a network with memory"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        make().configure_model()
    assert message in str(error.value)


def test_rows_drawn_by_priority_are_refused() -> None:
    with pytest.raises(OptionError, match="prioritized=True: MARWIL draws all rows alike"):
        by_hand().update(episode(weight=torch.ones(5)))


def test_only_weights_need_returns() -> None:
    assert MARWIL().wants_returns_to_go and not BC().wants_returns_to_go and not MARWIL(beta=0.0).wants_returns_to_go
    algorithm = BC(spec=DISCRETE)
    algorithm.configure_model()
    assert algorithm.critic is None and not [name for name in algorithm.state_dict() if "critic" in name]
