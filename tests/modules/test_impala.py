"""IMPALA: its loss against a brute force, what it learns, and that each of its options does what it says."""

import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from envs import CounterEnv, IdentityEnv, MaskedEnv, PictureEnv, RepeatPreviousEnv, SampleEnv, TargetEnv
from gymnasium import spaces
from helpers import greedy_return, make_runner, next_rollout, quiet_trainer
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import APPO, IMPALA, MLP, Evaluation, GRUNetwork, LSTMNetwork, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError
from lit_rl.normalizer import ReturnNormalizer
from lit_rl.rollout import Rollout, burnt_in, mask_of
from lit_rl.spec import EnvSpec
from lit_rl.trees import map_tree

F, T = False, True
BOTH = pytest.mark.parametrize("cls", [IMPALA, APPO])
SPEC = EnvSpec("hand-made", spaces.Box(-1, 1, (2,)), spaces.Discrete(3))


def bare(cls: type, spec: EnvSpec = SPEC, **options: Any) -> Any:
    """A built algorithm that keeps its gradients in place of stepping."""

    class Bare(cls):  # type: ignore[misc, valid-type]
        def optimize(self, loss: Tensor, optimizer: object = None) -> bool:
            self.zero_grad()
            loss.backward()
            self.last_loss = loss.item()
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
            return True

    torch.manual_seed(0)
    algorithm = Bare(**options)
    algorithm.build(spec)
    nn.init.normal_(algorithm.policy.head.weight, std=0.5)  # else all actions are equally probable
    if issubclass(cls, APPO):
        algorithm.follow(1.0)
    return algorithm


def small() -> Rollout:
    """B = 2, T = 5. Row 0 is truncated in its middle, row 1 terminated, and its next step is none, as in NEXT_STEP."""
    g = torch.Generator().manual_seed(1)
    next_: dict[str, Tensor] = {
        "reward": torch.randn(2, 5, generator=g),
        "terminated": torch.tensor([[F, F, F, F, F], [F, T, F, F, F]]),
        "truncated": torch.tensor([[F, F, T, F, F], [F, F, F, F, F]]),
    }
    rollout = Rollout(
        {
            "observation": torch.randn(2, 5, 2, generator=g), "action": torch.randint(3, (2, 5), generator=g),
            "action_log_prob": -1.0 + 0.4 * torch.randn(2, 5, generator=g),
            "is_init": torch.tensor([[T, F, F, T, F], [F, F, F, T, F]]),
            "mask": torch.tensor([[T, T, T, T, T], [T, T, F, T, T]]),
            "last_observation": torch.randn(2, 2, generator=g),
            "final_observation": torch.randn(2, 1, 2, generator=g), "final_step": torch.tensor([[2], [1]]),
            "policy_version": torch.zeros(2, 5, dtype=torch.int64),
            "next": next_ | {"done": next_["terminated"] | next_["truncated"]},
        },
        [2],
    )  # fmt: skip
    rollout["next", "reward"][1, 2] = rollout["action_log_prob"][1, 2] = 30.0  # of no meaning
    return rollout


def brute_force(
    hp: Any, rollout: Rollout, log_prob: Tensor, entropy: Tensor, value: Tensor, ends: dict[tuple[int, int], float],
    old_log_prob: Tensor | None = None, kl: Tensor | None = None, first: int = 0,
) -> Tensor:  # fmt: skip
    """The loss of IMPALA, or with a target policy's log-probabilities of APPO, step by step in plain numbers.

    Args:
        log_prob, entropy, value: with gradients, [B, T].
        ends: the critic's value of what follows each step (b, t) that ends an episode or its time line.
        first: the first step that is learned from.
    """
    mu, corrected = rollout["action_log_prob"].tolist(), (log_prob if old_log_prob is None else old_log_prob).tolist()
    reward, terminated, done = (rollout["next", key].tolist() for key in ("reward", "terminated", "done"))
    v, mask, losses = value.tolist(), mask_of(rollout), []
    for b in range(len(mu)):
        length = int(rollout["length"][b]) if "length" in rollout.keys() else len(mu[b])  # noqa: SIM118
        following_target = following_error = 0.0
        for t in reversed(range(first, length)):
            rho = math.exp(corrected[b][t] - mu[b][t])
            is_end = done[b][t] or t == length - 1
            next_value = 0.0 if terminated[b][t] else ends[b, t] if is_end else v[b][t + 1]
            next_target = next_value if is_end else following_target
            error = reward[b][t] + hp.gamma * next_value - v[b][t]
            trace = 0.0 if is_end else hp.gamma * hp.lambda_ * following_error
            if hp.vtrace:
                rho_v, c = min(hp.vtrace_clip_rho_threshold, rho), min(1.0, rho)
                following_error = rho_v * error + c * trace
                gain = reward[b][t] + hp.gamma * next_target - v[b][t]
                advantage = min(hp.vtrace_clip_pg_rho_threshold, rho) * gain
            else:
                advantage = following_error = error + trace
            following_target = v[b][t] + following_error
            if mask is not None and not mask[b, t]:
                continue
            loss = hp.value_coef * (value[b, t] - following_target) ** 2 / 2 - hp.entropy_coef * entropy[b, t]
            if old_log_prob is None:
                loss = loss - advantage * log_prob[b, t]
            else:
                ratio = min(math.exp(mu[b][t] - corrected[b][t]), hp.target_clip) * (log_prob[b, t] - mu[b][t]).exp()
                bounded = ratio.clamp(1 - hp.clip, 1 + hp.clip)
                loss = loss - torch.minimum(ratio * advantage, bounded * advantage) + hp.kl_coef * kl[b, t]
            losses.append(loss)
    return torch.stack(losses).mean()


def of_logits(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by `torch.distributions`."""
    found = torch.distributions.Categorical(logits=logits)
    return found.log_prob(action), found.entropy()


def double(algorithm: Any) -> Any:
    return copy.deepcopy(algorithm).double()


def ends_of(rollout: Rollout, value: Callable[[Tensor], Tensor]) -> dict[tuple[int, int], float]:
    last, final = (value(rollout[f"{name}_observation"].double()).tolist() for name in ("last", "final"))
    num_steps = rollout["action"].shape[1]
    lengths = rollout["length"].tolist() if "length" in rollout.keys() else [num_steps] * len(rollout)  # noqa: SIM118
    ends = {(b, length - 1): last[b] for b, length in enumerate(lengths)}
    return ends | {(b, t): final[b][f] for b, ts in enumerate(rollout["final_step"].tolist()) for f, t in enumerate(ts)}


def expected_loss(algorithm: Any, rollout: Rollout) -> tuple[Tensor, Any]:
    """By brute force in float64, from the networks' outputs alone; and the algorithm that its gradients are in."""
    twin, obs, action = double(algorithm), rollout["observation"].double(), rollout["action"]
    logits = twin.policy.head(twin.policy.encoder(obs))
    more: dict[str, Any] = {}
    if isinstance(algorithm, APPO):
        old = twin.target.head(twin.target.encoder(obs)).detach()
        distributions = [torch.distributions.Categorical(logits=x) for x in (old, logits)]
        more = {"old_log_prob": of_logits(old, action)[0], "kl": torch.distributions.kl_divergence(*distributions)}
    log_prob, entropy = of_logits(logits, action)
    ends = ends_of(rollout, twin.critic)
    return brute_force(algorithm.hp, rollout, log_prob, entropy, twin.critic(obs), ends, **more), twin


def assert_gradients(algorithm: Any, loss: Tensor, twin: Any) -> None:
    """Loss and gradients are those expected."""
    assert algorithm.last_loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    twin.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert algorithm.gradients.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(algorithm.gradients[name].double(), gradient, atol=1e-5, rtol=1e-3, msg=name)


OPTIONS: dict[str, Any] = {
    "gamma": 0.9, "lambda_": 0.8, "vtrace_clip_rho_threshold": 1.2, "vtrace_clip_pg_rho_threshold": 0.7,
    "value_coef": 0.7, "entropy_coef": 0.05, "network": functools.partial(MLP, hidden_sizes=[4]),
}  # fmt: skip


def small_of(kind: str) -> Rollout:
    """`small` without a mask, with it, or with a time line that ends before the last step."""
    rollout = small()
    if kind == "whole":
        del rollout["mask"]
    if kind == "ragged":
        rollout["length"] = torch.tensor([4, 5])
        rollout["mask"][0, 4] = False
        rollout["next", "reward"][0, 4] = torch.nan
    return rollout


@pytest.mark.parametrize("vtrace", [True, False])
@pytest.mark.parametrize("kind", ["whole", "masked", "ragged"])
def test_loss_and_gradient_equal_a_brute_force(vtrace: bool, kind: str) -> None:
    algorithm, rollout = bare(IMPALA, vtrace=vtrace, **OPTIONS), small_of(kind)
    with torch.no_grad():
        ratio = (algorithm.policy.evaluate(rollout)[0] - rollout["action_log_prob"]).exp()
    assert (ratio > 1.2).any() and ((ratio > 0.7) & (ratio < 1.2)).any() and (ratio < 0.7).any()  # of each kind
    metrics = algorithm.update(rollout)
    assert_gradients(algorithm, *expected_loss(algorithm, rollout))
    rho = ratio[rollout["mask"]] if kind != "whole" else ratio.flatten()
    assert metrics["vtrace/rho_mean"] == pytest.approx(rho.clamp(max=1.2).mean().item(), rel=1e-4)
    assert metrics["vtrace/rho_clipped"] == pytest.approx((rho > 1.2).float().mean().item())
    kl = rho - 1 - rho.log()
    assert metrics["policy/kl"] == pytest.approx(kl.mean().item(), rel=1e-4)


def test_on_the_policys_own_data_it_is_advantage_actor_critic() -> None:
    env = EnvConfig(CounterEnv)
    algorithm = bare(IMPALA, env.spec(), gamma=0.9)
    rollout = next_rollout(make_runner(env, algorithm.policy, 3, 16))
    algorithm.update(rollout)
    log_prob, entropy = algorithm.policy.evaluate(rollout)
    value, target = algorithm.value(rollout["observation"]), torch.zeros(3, 16)
    ends = ends_of(rollout, lambda x: algorithm.value(x.float()))
    for b in range(3):
        following = 0.0
        for t in reversed(range(16)):
            if rollout["next", "done"][b, t] or t == 15:
                following = 0.0 if rollout["next", "terminated"][b, t] else ends[b, t]
            target[b, t] = following = float(rollout["next", "reward"][b, t]) + 0.9 * following
    advantage = target - value.detach()
    loss = (-advantage * log_prob + 0.5 * 0.5 * (value - target).square() - 0.01 * entropy).mean()
    algorithm.zero_grad()
    loss.backward()
    for name, parameter in algorithm.named_parameters():
        torch.testing.assert_close(algorithm.gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


# --- actions, observations, memory ------------------------------------------------------------------------------------

DISCRETE = spaces.Discrete(6, start=2)
NESTED = spaces.Dict(kind=DISCRETE, force=spaces.Box(-1, 1, (2,)), where=spaces.Tuple([spaces.MultiDiscrete([3, 4])]))
FLAGS = {"observation_space": spaces.Box(-1, 1, (3,)), "action_space": spaces.MultiBinary(3)}
LSTM, GRU = (functools.partial(network, hidden_size=6) for network in (LSTMNetwork, GRUNetwork))
KINDS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "continuous": (TargetEnv, {}, {}),
    "squashed": (TargetEnv, {}, {"squash_actions": True}),
    "state-dependent, shared": (TargetEnv, {}, {"state_dependent_std": True, "share_encoder": True}),
    "masked": (MaskedEnv, {"action_space": DISCRETE}, {}),
    "nested, masked": (MaskedEnv, {"action_space": NESTED}, {}),
    "nested, masked, LSTM": (MaskedEnv, {"action_space": NESTED}, {"network": LSTM, "burn_in": 3}),
    "nested, squashed": (MaskedEnv, {"action_space": NESTED}, {"squash_actions": True}),
    "flags, GRU": (SampleEnv, FLAGS, {"network": GRU}),
    "pictures": (PictureEnv, {"size": 36}, {}),
}


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_actions_of_any_kind_have_the_ratio_1_on_the_policys_own_data(cls: type, kind: str) -> None:
    make, env_kwargs, options = KINDS[kind]
    env = EnvConfig(make, env_kwargs)
    algorithm = bare(cls, env.spec(), **options)
    rollout = next_rollout(make_runner(env, algorithm.policy, 3, 12))
    metrics = algorithm.update(rollout)
    assert metrics["vtrace/rho_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in algorithm.gradients.values())
    assert sum(gradient.abs().sum() for gradient in algorithm.gradients.values()) > 0
    if algorithm.policy.distribution.num_noise:  # of the algorithm's generator alone
        again = copy.deepcopy(algorithm)
        algorithm.generator.manual_seed(5)
        again.generator.manual_seed(5)
        torch.manual_seed(1)
        first = algorithm.update(rollout)
        torch.manual_seed(2)
        assert first["policy/entropy"] == again.update(rollout)["policy/entropy"]


@BOTH
@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("network", [LSTM, GRU], ids=["LSTM", "GRU"])
def test_with_memory_it_equals_stepping_through_the_rollout(cls: type, network: Any, burn_in: int) -> None:
    env = EnvConfig(SampleEnv, {"observation_space": SPEC.observation_space, "action_space": SPEC.action_space})
    algorithm = bare(cls, env.spec(), burn_in=burn_in, **OPTIONS | {"network": network})
    runner = make_runner(env, algorithm.policy, 3, 9)
    runner.sample()  # the next one begins inside of episodes
    rollout = next_rollout(runner)
    assert rollout["is_init"][:, burn_in:].any() and not rollout["is_init"][:, 0].all()
    for parameter in algorithm.policy.parameters():  # the policy has moved on
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=algorithm.generator)
    algorithm.update(rollout)
    twin = double(algorithm)
    features, ends = stepped(twin.policy, twin, rollout, burn_in)
    more: dict[str, Any] = {}
    if cls is APPO:
        old = twin.target.head(stepped(twin.target, twin, rollout, burn_in)[0]).detach()
        more = {"old_log_prob": of_logits(old, rollout["action"])[0], "kl": torch.zeros(3, 9)}
    log_prob, entropy = of_logits(twin.policy.head(features), rollout["action"])
    loss = brute_force(
        algorithm.hp, rollout, log_prob, entropy, twin.critic(features), ends, first=burn_in, **more
    )  # fmt: skip
    assert_gradients(algorithm, loss, twin)


def stepped(policy: Any, twin: Any, rollout: Rollout, burn_in: int) -> tuple[Tensor, dict[tuple[int, int], float]]:
    """Features [B, T, F], without gradients before the step `burn_in`; and the critic's values of what ends follow."""
    num_envs, num_steps = rollout["action"].shape
    features, ends = [], {}
    for b in range(num_envs):
        state = map_tree(lambda x, b=b: x[b : b + 1].double(), rollout["state"])
        for t in range(num_steps):
            if rollout["is_init"][b, t]:
                state = map_tree(lambda x: x.double(), policy.encoder.initial_state(1))
            one, state = policy.encoder(rollout["observation"][b, t : t + 1].double(), state)
            if t == burn_in - 1:
                state = map_tree(lambda x: x.detach(), state)
            features.append(one if t >= burn_in else one.detach())
            final = (rollout["final_step"][b] == t).nonzero()
            after = rollout["final_observation"][b, final[0, 0]] if len(final) else rollout["last_observation"][b]
            with torch.no_grad():
                ends[b, t] = twin.critic(policy.encoder(after[None].double(), state)[0]).item()
    return torch.cat(features).view(num_envs, num_steps, -1), ends


@BOTH
@pytest.mark.parametrize("network", [None, LSTM], ids=["MLP", "LSTM"])
def test_a_rollout_without_any_row_gives_no_gradient(cls: type, network: Any) -> None:
    env = EnvConfig(SampleEnv, FLAGS)
    algorithm = bare(cls, env.spec(), network=network, normalize_observations=True, normalize_returns=True)
    rollout = next_rollout(make_runner(env, algorithm.policy, 2, 6))
    rollout["length"], rollout["mask"] = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)
    rollout["final_step"].fill_(-1)
    metrics = algorithm.update(rollout)
    assert not any(gradient.any() for gradient in algorithm.gradients.values())
    assert all(value == 0 for value in metrics.values())
    assert int(algorithm.policy.normalizer.moments["/"].count) == int(algorithm.return_normalizer.count) == 0


def test_burn_in_stays_on_the_device_of_its_rollout() -> None:
    batch = TensorDict({name: torch.zeros(2, 5, 3, device="meta") for name in ("observation", "is_init")}, [2])
    batch["state"] = torch.zeros(2, 4, device="meta")
    found = burnt_in(batch, 2)
    assert {leaf.device.type for leaf in found.values(include_nested=True, leaves_only=True)} == {"meta"}
    assert found["burn_in", "observation"].shape == (2, 2, 3) and found["observation"].shape == (2, 3, 3)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_rewards_are_divided_by_the_deviation_of_returns_inside_of_time_lines() -> None:
    normalizer = ReturnNormalizer(0.5)
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, 100.0, 1.0]])
    done, is_init = torch.tensor([[F, T, F], [F, F, F]]), torch.tensor([[F, F, T], [F, F, T]])
    mask = torch.tensor([[T, T, T], [T, F, T]])
    # 1, 2 + 1/2, 4 (of a new episode) and 8, no row, 1 (after an episode that was not seen to end)
    sums = np.array([1.0, 2.5, 4.0, 8.0, 1.0])
    scaled = normalizer.scale_apart(reward, done, is_init, mask)
    torch.testing.assert_close(scaled, (reward / sums.std()).clamp(-10, 10).float())
    assert normalizer.running_return is None
    again = normalizer.scale_apart(10 * reward, done, is_init, torch.zeros_like(mask))
    torch.testing.assert_close(again, (10 * reward / sums.std()).clamp(-10, 10).float())


@BOTH
def test_statistics_take_each_row_once_however_often_it_comes(cls: type) -> None:
    env = EnvConfig(SampleEnv, FLAGS)
    algorithm = bare(cls, env.spec(), normalize_observations=True, normalize_returns=True, gamma=0.5)
    runner = make_runner(env, algorithm.policy, 2, 8)
    first, second = next_rollout(runner).clone(), next_rollout(runner).clone()
    other = bare(cls, env.spec(), normalize_observations=True, normalize_returns=True, gamma=0.5)
    before = first["next", "reward"].clone()
    for rollout in (first, second):
        other.update(rollout)
    repeat = first.clone()
    repeat["is_new"] = torch.zeros(2, dtype=torch.bool)
    mixed: Any = torch.cat([second, first])  # new rows, and past ones that are replayed
    mixed["is_new"] = torch.tensor([T, T, F, F])
    for rollout in (first, repeat, mixed, repeat):
        algorithm.update(rollout)
    assert torch.equal(first["next", "reward"], before)  # the batch, which may come again, is as it was
    moments, rewards = algorithm.policy.normalizer.moments["/"], algorithm.return_normalizer
    assert int(moments.count) == int(rewards.count) == 32
    unique = torch.cat([first["observation"], second["observation"]]).flatten(0, 1)
    torch.testing.assert_close(moments.mean, unique.mean(0))
    torch.testing.assert_close(moments.var, unique.var(0, correction=0))
    torch.testing.assert_close(rewards.var, other.return_normalizer.var)


# --- options ----------------------------------------------------------------------------------------------------------


def host(policy_lag: int) -> Any:
    source = SimpleNamespace(rollout_shape=(2, 8), policy_lag=policy_lag, budget=None, seed=0, ragged=False)
    return SimpleNamespace(source=source, is_resumed=False, rank=0)


def test_without_vtrace_only_appo_learns_from_older_policies() -> None:
    for cls, lag in ((IMPALA, 0), (APPO, 0), (APPO, 3)):
        bare(cls, vtrace=False).attach(host(lag))
    bare(IMPALA).attach(host(3))
    with pytest.raises(OptionError, match=r"vtrace=False: Bare then learns as if its own .* rows are 3 updates old"):
        bare(IMPALA, vtrace=False).attach(host(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"burn_in": 8, "network": LSTMNetwork}, "burn_in=8: expected fewer steps than rollout_length=8"),
        ({"burn_in": 2}, "burn_in=2: expected a network with memory"),
        ({"network": LSTMNetwork, "share_encoder": False}, "share_encoder=False"),
        ({"squash_actions": True}, "squash_actions=True: expected a Box action"),
        ({"network": LSTMNetwork, "compile": True}, "compile=True: .* has memory"),
    ],
)
def test_options_that_contradict_the_network_or_the_data_are_refused(
    make_trainer: Callable[..., L.Trainer], options: dict[str, Any], words: str
) -> None:
    data = RolloutDataModule("CartPole-v1", rollout_length=8, max_env_steps=128, seed=0)
    with pytest.raises(OptionError, match=words):
        make_trainer(limit_val_batches=0).fit(IMPALA(**options), data)


def test_trainer_options_that_do_not_apply_name_what_to_set(make_trainer: Callable[..., L.Trainer]) -> None:
    data = RolloutDataModule("CartPole-v1", rollout_length=8, max_env_steps=128, seed=0)
    with pytest.raises(OptionError, match=r"larger RolloutDataModule[(]num_envs_per_env_runner"):
        make_trainer(accumulate_grad_batches=2).fit(IMPALA(), data)


def test_compiled_steps_of_several_ranks_do_not_standardise_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = bare(IMPALA, compile=True, normalize_advantage=True)
    algorithm.attach(host(0))
    monkeypatch.setattr("lit_rl.modules.impala.distributed.world_size", lambda: 2)
    with pytest.raises(OptionError, match="normalize_advantage=True: with compile=True and several learner processes"):
        algorithm.attach(host(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd': expected one of 'adam', 'rmsprop'"),
        ({"vtrace_clip_rho_threshold": 0}, "vtrace_clip_rho_threshold=0: expected a number, above 0"),
        ({"vtrace_clip_pg_rho_threshold": -1}, "vtrace_clip_pg_rho_threshold=-1"),
        ({"lambda_": 2}, "lambda_=2: expected a number, at least 0 and at most 1"),
        ({"value_coef_schedule": "sine"}, "value_coef_schedule='sine'"),
        ({"rmsprop_decay": 1.5}, "rmsprop_decay=1.5"),
        ({"rmsprop_eps": 0}, "rmsprop_eps=0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        IMPALA(**options)
    assert words in str(caught.value)


def weights_of_a_run(cls: type, **options: Any) -> Tensor:
    """After four rollouts, which are each learned from twice."""

    class Twice(cls):  # type: ignore[misc, valid-type]
        def update(self, rollout: TensorDict) -> dict:
            super().update(rollout)
            return super().update(rollout)

    data = RolloutDataModule("CartPole-v1", rollout_length=16, num_envs_per_env_runner=4, max_env_steps=256, seed=0)
    algorithm, trainer = Twice(**{"lr": 1e-2} | options), quiet_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    assert trainer.global_step == 8
    return torch.cat([p.flatten() for p in [*algorithm.policy.parameters(), *algorithm.critic.parameters()]])


@pytest.fixture(scope="module")
def plain_weights() -> dict[type, Tensor]:
    """What every option must change."""
    torch.set_num_threads(1)  # as in every test
    return {cls: weights_of_a_run(cls) for cls in (IMPALA, APPO)}


SAID_ALOUD = {"optimizer": "adam"}  # the default: changes nothing


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (IMPALA, "optimizer", "adam"),
        (IMPALA, "optimizer", "rmsprop"),
        (IMPALA, "adam_eps", 1e-2),
        (IMPALA, "gamma", 0.5),
        (APPO, "vtrace", False),
        (IMPALA, "lambda_", 0.1),
        (IMPALA, "vtrace_clip_rho_threshold", 0.5),
        (IMPALA, "vtrace_clip_pg_rho_threshold", 0.5),
        (IMPALA, "value_coef", 3.0),
        (IMPALA, "value_coef_schedule", [[0, 3.0]]),
        (IMPALA, "entropy_coef", 0.5),
        (IMPALA, "entropy_coef_schedule", [[0, 0.5]]),
        (IMPALA, "lr_schedule", [[0, 1e-3]]),
        (IMPALA, "max_grad_norm", 0.01),
        (IMPALA, "normalize_advantage", True),
        (IMPALA, "normalize_observations", True),
        (IMPALA, "normalize_returns", True),
        (IMPALA, "share_encoder", True),
        (APPO, "clip", 0.001),
        (APPO, "target_clip", 0.5),
        (APPO, "target_update_interval", 1),
        (APPO, "tau", 0.1),
        (APPO, "kl_coef", 5.0),
    ],
)
def test_every_option_changes_what_is_learned(
    cls: type, option: str, value: object, plain_weights: dict[type, Tensor]
) -> None:
    found = weights_of_a_run(cls, **{option: value})
    same = found.shape == plain_weights[cls].shape and torch.equal(found, plain_weights[cls])
    assert same == (SAID_ALOUD.get(option) == value)


@pytest.mark.parametrize("option", ["rmsprop_decay", "rmsprop_eps"])
def test_options_of_rmsprop_change_what_is_learned(option: str) -> None:
    found = [weights_of_a_run(IMPALA, optimizer="rmsprop", **more) for more in ({}, {option: 0.5})]
    assert not torch.equal(*found)


def test_coefficients_follow_their_schedules(make_trainer: Callable[..., L.Trainer]) -> None:
    seen = []

    class Watched(IMPALA):
        def loss(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
            seen.append((self.env_steps_done, float(self.value_coef.value), float(self.entropy_coef.value)))
            return super().loss(batch)

    data = RolloutDataModule("CartPole-v1", rollout_length=16, max_env_steps=512, seed=0)
    make_trainer(limit_val_batches=0).fit(
        Watched(value_coef=0.8, value_coef_schedule="linear", entropy_coef_schedule=[[0, 0.1], [256, 0.3]]), data
    )
    steps, values, entropies = zip(*seen)
    assert steps == (0, 128, 256, 384)
    assert values == pytest.approx((0.8, 0.6, 0.4, 0.2)) and entropies == pytest.approx((0.1, 0.2, 0.3, 0.3))


# --- learning ---------------------------------------------------------------------------------------------------------


def play(cls: type, env: type[gym.Env], steps: int, data: dict[str, Any] | None = None, **options: Any) -> float:
    """Train, then play: the mean greedy return."""
    more = {"rollout_length": 4, "rollouts_per_epoch": 100, "seed": 0, "evaluation": Evaluation(episodes=20)}
    module = RolloutDataModule(env, max_env_steps=steps, **more | (data or {}))
    return greedy_return(cls(**{"lr": 1e-2, "gamma": 0.0} | options), module)


@BOTH
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_learns_to_name_a_discrete_observation(cls: type, seed: int) -> None:
    assert play(cls, IdentityEnv, 2500, {"seed": seed}) == 1.0


@pytest.mark.parametrize(("cls", "squash_actions"), [pytest.param(IMPALA, False, marks=pytest.mark.slow), (APPO, True)])
def test_learns_a_continuous_action_from_a_continuous_observation(cls: type, squash_actions: bool) -> None:
    options = {"lr_schedule": "linear", "normalize_returns": True, "squash_actions": squash_actions}
    assert play(cls, TargetEnv, 8000, **options) > -0.08  # acting at random costs about 0.7


@pytest.mark.slow
def test_learns_by_rmsprop() -> None:
    assert play(IMPALA, IdentityEnv, 4000, optimizer="rmsprop", rmsprop_eps=1e-4) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "network"), [(IMPALA, LSTMNetwork), (APPO, GRUNetwork)])
def test_memory_solves_repeating_the_previous_observation(cls: type, network: Any) -> None:
    factory = functools.partial(network, hidden_size=16, encoder=functools.partial(MLP, hidden_sizes=[16]))
    data = {"rollout_length": 16, "num_envs_per_env_runner": 16}
    assert play(cls, RepeatPreviousEnv, 60_000, data, network=factory, gamma=0.5) > 7.5
