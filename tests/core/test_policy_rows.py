"""Policies judged by recorded episodes: which densities, which halves, which refusals."""

from collections import OrderedDict
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from known_mdp import GAMMA, MU, PI, T, exact, play

from lit_rl import EnvSpec, LSTMNetwork, Policy, QPolicy, evaluate_offline
from lit_rl.errors import DataError, OptionError
from lit_rl.evaluation import estimating, fitted_q, offline, policy_rows
from lit_rl.evaluation.by_fitted_q import cross_fitted, transitions_of
from lit_rl.evaluation.estimating import OfflineResult, estimate, padded
from lit_rl.evaluation.fitted_q import Choices, Transitions
from lit_rl.evaluation.policy_rows import PolicyRows, fitted_log_prob
from lit_rl.recorded import Recorded

TABLE = EnvSpec("Table-v0", spaces.Box(0.0, 1.0, (2,), np.float32), spaces.Discrete(2))


class Same(torch.nn.Module):
    """The observation itself."""

    def __init__(self, space: gym.Space):
        super().__init__()
        self.output_size = int(np.prod(space.shape or ()))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs


def table_policy(probs: np.ndarray = PI, kind: type = Policy) -> Any:
    """The policy with these probabilities (or values) in the two states."""
    policy = kind(TABLE, network=Same).eval()
    policy.head.weight.data = torch.from_numpy(np.log(probs).T).float()
    policy.head.bias.data.zero_()
    return policy


def episodes_of(mdp: dict[str, np.ndarray], **changed: Any) -> Recorded:
    """What `play` gave, recorded with closing rows."""
    lengths = mdp["real"].sum(1)
    kept = np.arange(T + 1) <= lengths[:, None]

    def rows(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, T + 1 - x.shape[1])))[kept]

    log_prob = np.log(MU[mdp["state"][:, :-1], mdp["action"]]) * mdp["real"]
    columns = {
        "observation": np.eye(2, dtype=np.float32)[rows(mdp["state"])],
        "action": rows(mdp["action"] * mdp["real"]),
        "log_prob": rows(log_prob).astype(np.float32),
        "deterministic": np.zeros(kept.sum(), np.bool_),
    }
    given = {
        "columns": columns,
        "reward": rows(mdp["reward"]).astype(np.float32),
        "terminated": rows(mdp["terminated"]),
        "truncated": rows(mdp["truncated"]),
        "closing": (np.arange(T + 1) == lengths[:, None])[kept],
        "begins": np.cumsum([0, *(lengths[:-1] + 1)]),
    }
    return Recorded(**given | changed)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return episodes_of(play(2000, seed=4))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, of a size for tables."""
    for name, value in {"LR": 0.03, "LAST_LR": 0.001, "TAU": 0.2}.items():
        monkeypatch.setattr(fitted_q, name, value)
    monkeypatch.setattr(policy_rows, "FIT_UPDATES", 150)
    monkeypatch.setattr(policy_rows, "FIT_LR", 0.01)


def value_of(probs: np.ndarray, **options: Any) -> float:
    return float((probs * exact(probs, **options)[0]).sum(1).mean())


def named(result: OfflineResult) -> dict[str, float]:
    return {each.name: each.value for each in result.estimates}


# --- what is estimated ----------------------------------------------------------------------------------------------


def test_all_estimators_come_to_the_known_value(recorded: Recorded) -> None:
    result = estimate(table_policy(), recorded, gamma=GAMMA, num_updates=250, num_refits=2)
    found = named(result)
    assert list(found) == ["IS", "PDIS", "WIS", "WPDIS", "DR", "FQE (sampled)", "FQE (greedy)"]
    for name in ("IS", "PDIS", "WIS", "WPDIS", "DR"):
        assert found[name] == pytest.approx(value_of(PI), abs=0.2)
    far = {"cut": 0.0, "horizon": 200}
    assert found["FQE (sampled)"] == pytest.approx(value_of(PI, **far), rel=0.15)
    assert found["FQE (greedy)"] == pytest.approx(value_of(np.array([[0, 1], [0, 1]]), **far), rel=0.15)
    assert result.data.value == pytest.approx(value_of(MU), abs=0.2)
    assert (result.judged, result.behavior, result.num_episodes) == ("sampled", "recorded", 2000)
    assert "goes on after it" in result.notes[0]
    assert set(result.metrics) == {"is", "pdis", "wis", "wpdis", "dr", "fqe_sampled", "fqe_greedy"}


def test_ratios_are_those_of_the_policy_that_is_judged(recorded: Recorded) -> None:
    states, actions = recorded.columns["observation"].argmax(1), recorded.columns["action"]
    ratio = padded(np.log(PI / MU)[states, actions], recorded)
    found = estimate(table_policy(), recorded, gamma=GAMMA, estimators=["pdis"])
    expected = offline.per_decision(padded(recorded.reward, recorded), ratio, gamma=GAMMA)
    assert found.estimates[0].value == pytest.approx(expected.value, abs=1e-4)
    assert found.estimates[0].low == pytest.approx(expected.low, abs=1e-4)


def test_epsilon_judges_the_most_probable_action_with_random_ones(recorded: Recorded) -> None:
    for kind in (Policy, QPolicy):
        result = estimate(table_policy(kind=kind), recorded, gamma=GAMMA, estimators=["wpdis", "fqe"], epsilon=0.4,
                          num_updates=200, num_refits=2)  # fmt: skip
        probs = np.array([[0.2, 0.8], [0.2, 0.8]])
        found = named(result)
        assert list(found) == ["WPDIS", "FQE (epsilon-greedy)", "FQE (greedy)"]
        assert found["WPDIS"] == pytest.approx(value_of(probs), abs=0.25)
        assert found["FQE (epsilon-greedy)"] == pytest.approx(value_of(probs, cut=0.0, horizon=200), rel=0.15)
        assert result.judged == "epsilon-greedy"


def test_a_fitted_behaviour_policy_takes_the_place_of_missing_densities(recorded: Recorded) -> None:
    columns = {name: x for name, x in recorded.columns.items() if name not in ("log_prob", "deterministic")}
    bare = Recorded(**{**vars(recorded), "columns": columns})
    result = estimate(table_policy(), bare, gamma=GAMMA, estimators=["wpdis"], behavior="fit")
    assert result.behavior == "fitted"
    assert result.estimates[0].value == pytest.approx(value_of(PI), abs=0.2)
    states, actions = recorded.columns["observation"].argmax(1), recorded.columns["action"]
    found = np.exp(fitted_log_prob(table_policy(), bare))
    np.testing.assert_allclose(found[~recorded.closing], MU[states, actions][~recorded.closing], atol=0.08)


def test_doubly_robust_values_an_episode_by_a_fit_to_the_other_half(recorded: Recorded) -> None:
    weights: list[torch.Tensor] = []

    def fit(data: Transitions, choices: Choices, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights.append(given)
        return given[:, data.episode], given[:, data.episode]

    rows = PolicyRows(table_policy(), recorded)
    q, value = cross_fitted(fit, transitions_of(recorded, rows, GAMMA), rows.choices(), seed=0)
    assert not q.any()  # no episode is valued by a fit in which it counted
    assert not value.any()
    assert weights[0].sum(1).tolist() == [1000, 1000]
    assert (weights[0].sum(0) == 1).all()


def test_estimation_leaves_policy_and_random_numbers_as_they_were(recorded: Recorded) -> None:
    policy = table_policy()
    before = policy.rng.bit_generator.state, torch.random.get_rng_state()
    first, second = (estimate(policy, recorded, gamma=GAMMA, num_updates=5, num_refits=2) for _ in range(2))
    assert named(first) == named(second)
    assert policy.rng.bit_generator.state == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_episodes_that_were_cut_off_are_left_out_if_they_are_few(recorded: Recorded) -> None:
    last = recorded.begins + recorded.lengths - 1
    flags = {name: getattr(recorded, name).copy() for name in ("terminated", "truncated")}
    for x in flags.values():
        x[last[:10]] = False
    result = estimate(table_policy(), Recorded(**{**vars(recorded), **flags}), gamma=GAMMA, estimators=["wis"])
    assert result.num_episodes == 1990
    assert result.notes[0].startswith("10 of 2000 episodes are neither terminated nor truncated")
    rest = estimate(table_policy(), recorded.only(np.arange(10, 2000)), gamma=GAMMA, estimators=["wis"])
    assert rest.estimates[0] == result.estimates[0]


def test_a_result_in_json_has_no_numbers_that_are_none(recorded: Recorded) -> None:
    never = np.array([[1.0, 0.0], [1.0, 0.0]])
    with np.errstate(divide="ignore"):
        policy = table_policy(np.maximum(never, 1e-30))
    result = estimate(policy, recorded.only(np.arange(12)), gamma=GAMMA, estimators=["is", "wis"])
    assert "NaN" not in result.to_json()
    assert all(each.warning for each in result.estimates)


# --- policies of all kinds ------------------------------------------------------------------------------------------


def rows_of(spec: EnvSpec, lengths: list[int], seed: int = 0) -> Recorded:
    """Episodes of random observations and actions, that end truncated."""
    rng = np.random.default_rng(seed)
    sizes = np.array(lengths) + 1
    num, ends = int(sizes.sum()), np.cumsum(sizes)
    closing = np.isin(np.arange(num), ends - 1)
    columns: dict[str, np.ndarray] = {"log_prob": np.full(num, -1.0, np.float32), "deterministic": np.zeros(num, bool)}
    for name, space in (("observation", spec.observation_space), ("action", spec.action_space)):
        space.seed(seed)
        values = [space.sample() for _ in range(num)]
        if isinstance(space, spaces.Dict):
            columns |= {f"{name}/{key}": np.stack([x[key] for x in values]) for key in space.spaces}
        else:
            columns[name] = np.stack([np.asarray(x) for x in values])
    last = np.isin(np.arange(num), ends - 2)
    return Recorded(
        columns, rng.normal(size=num).astype(np.float32), np.zeros(num, np.bool_), last, closing, ends - sizes
    )


def test_a_policy_with_memory_is_asked_through_each_episode() -> None:
    spec = EnvSpec("Memory-v0", spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(3, start=1))
    torch.manual_seed(0)
    policy = Policy(spec, network=LSTMNetwork).eval()
    torch.nn.init.normal_(policy.head.weight)
    recorded = rows_of(spec, [3, 5, 1, 4])
    expected = np.zeros(len(recorded.reward))
    for begin, length in zip(recorded.begins, recorded.lengths):
        state = policy.encoder.initial_state(1)
        for t in range(begin, begin + length):
            with torch.no_grad():
                obs = torch.from_numpy(recorded.columns["observation"][t : t + 1])
                features, state = policy.encoder(policy.inputs(obs), state)
                action = torch.from_numpy(recorded.columns["action"][t : t + 1] - 1)
                expected[t] = policy.evaluate_actions(features, obs, action)[0].item()
    found = PolicyRows(policy, recorded)
    np.testing.assert_allclose(found.log_prob(), expected, atol=1e-5)
    assert found.inputs().shape == (17, 3 + policy.encoder.output_size)
    assert estimate(policy, recorded, gamma=0.9, num_updates=2, num_refits=2).num_episodes == 4


def test_epsilon_greedy_keeps_to_legal_actions() -> None:
    seen = OrderedDict(action_mask=spaces.MultiBinary(3), observation=spaces.Box(-1.0, 1.0, (2,), np.float32))
    spec = EnvSpec("Masked-v0", spaces.Dict(seen), spaces.Discrete(3))
    recorded = rows_of(spec, [4, 4])
    mask = np.tile(np.array([1, 0, 1], np.uint8), (10, 1))
    recorded.columns["observation/action_mask"][:] = mask
    probs = PolicyRows(Policy(spec), recorded).probs(epsilon=0.2)
    torch.testing.assert_close(probs.sort(1).values, torch.tensor([0.0, 0.1, 0.9]).expand(10, 3))
    assert not probs[:, 1].any()


@pytest.mark.parametrize("squash", [False, True])
def test_box_actions_are_valued_as_the_environment_is_given_them(squash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EnvSpec("Box-v0", spaces.Box(0.0, 1.0, (1,), np.float32), spaces.Box(-2.0, 2.0, (1,), np.float32))
    policy = Policy(spec, network=Same, squash=squash, log_std_init=-2.0).eval()
    policy.head.weight.data.zero_()
    policy.head.bias.data.fill_(np.arctanh(0.5) if squash else 1.0)  # either way 1 for the environment
    rng = np.random.default_rng(7)
    recorded = rows_of(spec, [1] * 300)
    action = rng.uniform(-2, 2, (600, 1)).astype(np.float32)
    recorded.columns["action"][:] = action
    recorded = Recorded(**{**vars(recorded), "reward": action[:, 0] * 3, "terminated": recorded.truncated,
                           "truncated": recorded.terminated})  # fmt: skip
    monkeypatch.setattr(fitted_q, "LR", 0.01)
    found = named(estimate(policy, recorded, gamma=0.9, estimators=["fqe"], num_updates=200, num_refits=2))
    assert found["FQE (greedy)"] == pytest.approx(3.0, abs=0.4)
    assert found["FQE (sampled)"] == pytest.approx(3.0, abs=0.4)
    rows = PolicyRows(policy, recorded)
    assert rows.action()[:, 0].numpy() == pytest.approx(action[:, 0] / 2, abs=1e-6)
    inside = action[:, 0] / 2 if squash else action[:, 0]
    unbounded = np.arctanh(inside) if squash else inside
    z = (unbounded - policy.head.bias.item()) / np.exp(-2.0)
    log_prob = -0.5 * z**2 + 2.0 - 0.5 * np.log(2 * np.pi) - (np.log1p(-(inside**2)) if squash else 0.0)
    np.testing.assert_allclose(rows.log_prob()[rows.steps], log_prob[rows.steps], rtol=1e-3)


def test_nested_spaces_and_images_can_be_judged() -> None:
    nested = spaces.Dict({"move": spaces.Discrete(3), "force": spaces.Box(-1.0, 1.0, (2,), np.float32)})
    vector = EnvSpec("Nested-v0", spaces.Box(-1.0, 1.0, (3,), np.float32), nested)
    image = EnvSpec("Image-v0", spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.MultiDiscrete([2, 3]))
    for spec, width in ((vector, 3 + 2), (image, 2 + 3)):
        recorded = rows_of(spec, [2, 3, 2])
        torch.manual_seed(0)
        policy = Policy(spec).eval()
        assert PolicyRows(policy, recorded).action().shape == (10, width)
        result = estimate(policy, recorded, gamma=0.9, num_updates=2, num_refits=2)
        assert np.isfinite(list(named(result).values())).all()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_greedy_policy_is_refused_by_importance_sampling_without_epsilon(recorded: Recorded) -> None:
    policy = table_policy(kind=QPolicy)
    for name in ("is", "pdis", "wis", "wpdis", "dr"):
        with pytest.raises(OptionError, match=rf"^{name}: importance sampling .* this one is greedy\. Set epsilon"):
            estimate(policy, recorded, gamma=GAMMA, estimators=["fqe", name])
    result = estimate(policy, recorded, gamma=GAMMA, num_updates=2, num_refits=2)
    assert list(named(result)) == ["FQE (greedy)"]
    assert result.notes[0].startswith("Not estimated: is, pdis, wis, wpdis, dr. importance sampling")
    assert result.behavior == "none"


@pytest.mark.parametrize("what", ["no column", "greedy rows", "all 0"])
def test_missing_densities_are_refused(recorded: Recorded, what: str) -> None:
    columns = dict(recorded.columns)
    if what == "no column":
        del columns["log_prob"]
    elif what == "greedy rows":
        columns["deterministic"] = recorded.begins[3] == np.arange(len(recorded.reward))
    else:
        columns["log_prob"] = np.zeros(len(recorded.reward), np.float32)
    given = Recorded(**{**vars(recorded), "columns": columns})
    number = 1 if what == "greedy rows" else 2000
    with pytest.raises(OptionError, match=rf"^wis: the probability .* missing in {number} of 2000 .* behavior='fit'"):
        estimate(table_policy(), given, gamma=GAMMA, estimators=["wis"])


@pytest.mark.parametrize("estimator", estimating.ESTIMATORS)
def test_episodes_without_flags_of_their_end_are_refused(recorded: Recorded, estimator: str) -> None:
    none = np.zeros(len(recorded.reward), np.bool_)
    given = Recorded(**{**vars(recorded), "terminated": none, "truncated": none})
    with pytest.raises(
        DataError, match=r"2000 of 2000 episodes are neither terminated nor truncated .* Give the columns"
    ):
        estimate(table_policy(), given, gamma=GAMMA, estimators=[estimator])


def test_options_that_cannot_be_are_refused(recorded: Recorded) -> None:
    policy, box = table_policy(), EnvSpec("Box-v0", TABLE.observation_space, spaces.Box(-1.0, 1.0, (1,), np.float32))
    for options, words in (
        ({"estimators": ["dm"]}, "estimators=.*: expected a list of 'is', 'pdis'"),
        ({"estimators": []}, "estimators=.*: expected a list"),
        ({"behavior": "guess"}, "behavior='guess': expected one of 'recorded', 'fit'"),
        ({"gamma": 1.5}, "gamma=1.5: expected a number, at least 0 and at most 1"),
        ({"epsilon": -0.1}, "epsilon=-0.1: expected"),
        ({"num_updates": 0}, "num_updates=0: expected"),
        ({"num_refits": 1}, "num_refits=1: expected"),
    ):
        with pytest.raises(OptionError, match=words):
            estimate(policy, recorded, **{"gamma": GAMMA, **options})
    with pytest.raises(OptionError, match=r"epsilon=0.1: expected a Discrete action space, got Box"):
        estimate(Policy(box), recorded, gamma=GAMMA, epsilon=0.1)
    several = Recorded(**{**vars(recorded), "agents": ["a", "b"] * 1000})
    with pytest.raises(OptionError, match=r"of 2 agents\. Offline evaluation judges one policy"):
        estimate(policy, several, gamma=GAMMA)
    with pytest.raises(OptionError, match=r"^dr: half of the episodes"):
        estimate(policy, recorded.only(np.arange(1)), gamma=GAMMA, estimators=["dr"])


def test_a_policy_of_several_agents_is_refused(tmp_path: Any) -> None:
    with pytest.raises(OptionError, match=r"policy=object: expected one policy\."):
        estimating.check_spaces(object(), TABLE, ["data"])


def test_other_spaces_are_refused() -> None:
    other = EnvSpec("Other-v0", TABLE.observation_space, spaces.Discrete(3))
    with pytest.raises(OptionError, match=r"the action space Discrete\(3\), the policy has Discrete\(2\)\. Give"):
        estimating.check_spaces(table_policy(), other, ["data"])
    other = EnvSpec("Other-v0", spaces.Box(0.0, 1.0, (3,), np.float32), spaces.Discrete(2))
    with pytest.raises(OptionError, match=r"the observation space Box.*, the policy has Box"):
        estimating.check_spaces(table_policy(), other, ["data"])


def test_tables_of_other_tools_are_read_in_the_spaces_of_the_policy(tmp_path: Any) -> None:
    path = tmp_path / "log.csv"
    lines = [f"{i},{t},{1 - t},{(i + t) % 2},{t},{t == 1},False" for i in range(20) for t in range(2)]
    path.write_text("\n".join(["run,left,right,chosen,gain,over,cut", *lines]))
    columns = {
        "observation": ["left", "right"], "action": "chosen", "reward": "gain", "terminated": "over",
        "truncated": "cut", "episode": "run",
    }  # fmt: skip
    result = evaluate_offline(table_policy(), path, columns=columns, gamma=GAMMA, estimators=["wis"], behavior="fit")
    assert result.num_episodes == 20
    assert result.data.value == pytest.approx(GAMMA)
