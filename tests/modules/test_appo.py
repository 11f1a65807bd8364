"""APPO: its loss and its target policy by hand. What it shares with IMPALA is in test_impala.py."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from envs import TargetEnv
from helpers import assert_same, quiet_trainer
from tensordict import TensorDict
from test_impala import OPTIONS, assert_gradients, bare, expected_loss, small, small_of
from torch import Tensor

from lit_rl import APPO, IMPALA, PPO, Policy, RolloutDataModule
from lit_rl.errors import OptionError


def moved(algorithm: Any) -> Any:
    """An algorithm whose target policy is another than its policy."""
    g = torch.Generator().manual_seed(3)
    for parameter in algorithm.target.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    return algorithm


@pytest.mark.parametrize("kl_coef", [0.0, 0.8])
@pytest.mark.parametrize("vtrace", [True, False])
@pytest.mark.parametrize("kind", ["whole", "masked", "ragged"])
def test_loss_and_gradient_equal_a_brute_force(kind: str, vtrace: bool, kl_coef: float) -> None:
    options = OPTIONS | {"vtrace": vtrace, "kl_coef": kl_coef, "clip": 0.2, "target_clip": 1.3}
    algorithm, rollout = moved(bare(APPO, **options)), small_of(kind)
    with torch.no_grad():
        log_prob, old = (policy.evaluate(rollout)[0] for policy in (algorithm.policy, algorithm.target))
        to_old = (rollout["action_log_prob"] - old).exp()
        ratio = to_old.clamp(max=1.3) * (log_prob - rollout["action_log_prob"]).exp()
    assert (to_old > 1.3).any() and (to_old < 1.3).any() and (ratio > 1.2).any() and (ratio < 0.8).any()
    metrics = algorithm.update(rollout)
    loss, twin = expected_loss(algorithm, rollout)
    assert_gradients(algorithm, loss, twin)
    real = rollout["mask"] if kind != "whole" else torch.ones_like(rollout["is_init"])
    rho, ratio = 1 / to_old[real], ratio[real]
    assert metrics["vtrace/rho_mean"] == pytest.approx(rho.clamp(max=1.2).mean().item(), rel=1e-4)
    assert metrics["vtrace/rho_clipped"] == pytest.approx((rho > 1.2).float().mean().item())
    assert metrics["policy/clip_fraction"] == pytest.approx(((ratio - 1).abs() > 0.2).float().mean().item())
    first, second = (torch.softmax(p(rollout["observation"]), -1)[real] for p in (algorithm.target, algorithm.policy))
    expected = (first * (first / second).log()).sum(-1).mean().item()
    assert metrics["policy/kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_where_the_target_policy_is_the_one_that_acted_it_is_ppos_surrogate() -> None:
    algorithm, rollout = bare(APPO, clip=0.2, value_coef=0.0, entropy_coef=0.0, gamma=0.9), small()
    del rollout["mask"]
    with torch.no_grad():
        rollout["action_log_prob"] = algorithm.target.evaluate(rollout)[0]
    moved_on = torch.Generator().manual_seed(3)
    for parameter in algorithm.policy.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=moved_on)
    batch = algorithm.batch_of(rollout)
    loss, _ = algorithm.loss(batch)
    log_prob, _, value = algorithm.evaluate(batch, algorithm.policy.features(batch))
    ratio = (log_prob - rollout["action_log_prob"]).exp()
    advantage, _ = algorithm.targets(batch, value.detach(), torch.zeros(2, 5))
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(loss, expected)
    assert ((ratio - 1).abs() > 0.2).any()


def test_with_a_wide_clip_its_first_gradient_is_impalas() -> None:
    """The target policy is the policy: mu / pi_old * pi / mu is 1, with the gradient of log pi."""
    wide = {"clip": 1e6, "target_clip": 1e6}
    algorithm, other, rollout = bare(APPO, **OPTIONS | wide), bare(IMPALA, **OPTIONS), small()
    for each in (algorithm, other):
        each.update(rollout)
    for name, gradient in other.gradients.items():
        torch.testing.assert_close(algorithm.gradients[name], gradient, msg=name)


class Watched(APPO):
    """Notes, before each update, the policy and the target policy."""

    def update(self, rollout: TensorDict) -> dict[str, Tensor | float]:
        self.seen = getattr(self, "seen", [])
        states = ({k: v.clone() for k, v in x.state_dict().items()} for x in (self.policy, self.target))
        self.seen.append(tuple(states))
        return super().update(rollout)


DATA: dict[str, Any] = {"rollout_length": 4, "num_envs_per_env_runner": 4, "seed": 0}


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_target_policy_is_a_snapshot_taken_every_interval(tau: float) -> None:
    algorithm = Watched(lr=1e-2, target_update_interval=3, tau=tau, normalize_observations=True)
    data = RolloutDataModule(TargetEnv, max_env_steps=16 * 8, **DATA)
    quiet_trainer(limit_val_batches=0).fit(algorithm, data)
    assert len(algorithm.seen) == 8
    expected = algorithm.seen[0][0]  # at first it is the policy
    statistics = [name for name, _ in algorithm.policy.named_buffers()]
    assert any("mean" in name for name in statistics)
    for number, (policy, target) in enumerate(algorithm.seen):
        if number and number % 3 == 0:  # after three gradient steps
            old = expected
            expected = {k: v if k in statistics or tau == 1 else torch.lerp(old[k], v, tau) for k, v in policy.items()}
        assert_same(target, expected)
        assert all(torch.equal(policy[k], v) for k, v in target.items()) == (
            number == 0 or (number % 3 == 0 and tau == 1)
        )


def test_a_skipped_step_leaves_the_target_policy_alone(make_trainer: Callable[..., L.Trainer]) -> None:
    class Spoiled(Watched):
        def update(self, rollout: TensorDict) -> dict[str, Tensor | float]:
            if self.updates_done == 1:
                rollout["next", "reward"][0, 0] = torch.nan
            return super().update(rollout)

    algorithm = Spoiled(lr=1e-2, target_update_interval=1)
    with pytest.warns(UserWarning, match="skipped"):
        make_trainer(limit_val_batches=0).fit(algorithm, RolloutDataModule(TargetEnv, max_env_steps=16 * 4, **DATA))
    (_, first), (_, second), (_, third), (_, fourth) = algorithm.seen
    assert_same(third, second)
    assert not any(torch.equal(second[k], x[k]) for x in (first, fourth) for k in second)


def test_the_target_policy_begins_as_the_policy_whose_weights_a_run_begins_with(
    make_trainer: Callable[..., L.Trainer],
) -> None:
    data = {"max_env_steps": 32, **DATA}
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(PPO(minibatch_size=16, lr=0.1), RolloutDataModule(TargetEnv, **data))
    trainer.save_checkpoint("ppo.ckpt")
    algorithm = Watched()
    algorithm.init_from = "ppo.ckpt"
    make_trainer(limit_val_batches=0).fit(algorithm, RolloutDataModule(TargetEnv, **data))
    policy, target = algorithm.seen[0]
    assert_same(target, policy)
    weights = torch.load("ppo.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(weights["policy.head.weight"], policy["head.weight"])


def test_a_resumed_run_goes_on_with_its_target_policy(make_trainer: Callable[..., L.Trainer]) -> None:
    def fit(steps: int, path: str | None = None) -> tuple[Watched, L.Trainer]:
        algorithm, trainer = Watched(lr=1e-2, target_update_interval=3), make_trainer(limit_val_batches=0)
        data = RolloutDataModule(TargetEnv, max_env_steps=16 * steps, rollouts_per_epoch=1, **DATA)
        trainer.fit(algorithm, data, ckpt_path=path)
        return algorithm, trainer

    whole, _ = fit(8)
    half, trainer = fit(4)
    trainer.save_checkpoint("half.ckpt")
    assert not torch.equal(half.target.head.weight, half.policy.head.weight)
    resumed, _ = fit(8, "half.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())


class OwnActions(Policy):
    """Chooses as ever, in words of its own."""

    def evaluate_actions(self, features: Tensor, obs: Any, action: Any) -> tuple[Tensor, Tensor]:
        return super().evaluate_actions(features, obs, action)


def test_the_divergence_of_a_policy_of_ones_own_is_estimated_from_actions() -> None:
    exact, rollout = moved(bare(APPO, kl_coef=0.5, **OPTIONS)), small()
    torch.manual_seed(0)
    estimated = moved(bare(APPO, kl_coef=0.5, policy_class=OwnActions, **OPTIONS))
    del rollout["mask"]
    with torch.no_grad():
        log_prob, old = (policy.evaluate(rollout)[0] for policy in (exact.policy, exact.target))
    # k3 of pi / pi_old, weighed by pi_old / mu since mu acted, up to target_clip
    weight = (old - rollout["action_log_prob"]).exp().clamp(max=2.0)
    expected = (weight * ((log_prob - old).exp() - 1 - (log_prob - old))).mean().item()
    assert estimated.update(rollout)["policy/kl"] == pytest.approx(expected, rel=1e-4)
    assert exact.update(rollout)["policy/kl"] != pytest.approx(expected, rel=1e-2)
    assert not torch.equal(estimated.gradients["policy.head.weight"], exact.gradients["policy.head.weight"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0}, "clip=0: expected a number, above 0"),
        ({"target_clip": -1}, "target_clip=-1: expected a number, above 0"),
        ({"target_update_interval": 0}, "target_update_interval=0: expected a whole number of at least 1"),
        ({"tau": 0}, "tau=0: expected a number, above 0 and at most 1"),
        ({"kl_coef": -1}, "kl_coef=-1: expected a number, at least 0"),
        ({"lambda_": math.nan}, "lambda_=nan"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        APPO(**options)
    assert words in str(caught.value)
