"""PPO: what it learns, and that each of its options does what it says."""

import copy

import numpy as np
import pytest
import torch
from envs import ClockEnv, CounterEnv, IdentityEnv, TargetEnv, counter_vector
from helpers import greedy_return, quiet_trainer
from tensordict import TensorDict

from lit_rl import MLP, PPO, Evaluation, RolloutDataModule
from lit_rl.errors import CheckpointError, LitRLError, OptionError
from lit_rl.modules.ppo import explained_variance


def train(env, steps: int, model: dict, data: dict, **trainer) -> tuple[PPO, RolloutDataModule, float]:
    """Train, then play: the algorithm, its datamodule, and the mean greedy return."""
    module = RolloutDataModule(env, max_env_steps=steps, **{"seed": 0, "evaluation": Evaluation(episodes=20)} | data)
    algorithm = PPO(**{"num_epochs": 4, "normalize_returns": False} | model)
    return algorithm, module, greedy_return(algorithm, module, **trainer)


SMALL = {"num_envs_per_env_runner": 8, "rollout_length": 16}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_to_name_a_discrete_observation(seed: int) -> None:
    model = {"lr": 1e-2, "minibatch_size": 64, "gamma": 0.0}
    *_, return_ = train(IdentityEnv, 2_500, model, SMALL | {"seed": seed})
    assert return_ == 1.0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_learns_a_continuous_action_from_a_continuous_observation(seed: int) -> None:
    model = {"lr": 1e-2, "lr_schedule": "linear", "minibatch_size": 64, "gamma": 0.0, "normalize_observations": True}
    *_, return_ = train(TargetEnv, 6_000, model, SMALL | {"seed": seed})
    assert return_ > -0.02  # acting at random costs about 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_cartpole(seed: int) -> None:
    model = {"lr": 1e-3, "gamma": 0.98, "gae_lambda": 0.8, "num_epochs": 10}
    *_, return_ = train("CartPole-v1", 30_000, model, {"seed": seed})
    assert return_ > 300


@pytest.mark.parametrize("vectorization", ["sync", pytest.param("native", marks=pytest.mark.slow)])
def test_a_time_limit_is_bootstrapped_not_a_value_of_zero(vectorization: str) -> None:
    env = ClockEnv if vectorization == "sync" else clock_vector
    model = {"lr": 1e-2, "gamma": 0.5, "minibatch_size": 64, "value_coef": 1.0, "max_grad_norm": None}
    data = SMALL | {"vectorization": vectorization}
    algorithm, *_ = train(env, 8_000, model, data)
    # 1 + 0.5 + 0.25 + ... = 2; were the limit an end, 1.4.
    assert algorithm.value(torch.zeros(1, 1)).item() == pytest.approx(2.0, abs=0.05)


def clock_vector(num_envs: int):
    """ClockEnv in autoreset mode NEXT_STEP: one row in six is no transition."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    return SyncVectorEnv([ClockEnv] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)


def collect(make_trainer, env, data: dict, model: dict | None = None) -> tuple[PPO, TensorDict]:
    """A PPO attached to a Trainer, its update not run, and one rollout."""
    kept = []

    class Keep(PPO):
        def update(self, batch: TensorDict) -> dict:
            kept.append(batch.clone())
            return {}

    module = RolloutDataModule(env, rollouts_per_epoch=1, **{"seed": 0} | data)
    algorithm = Keep(**model or {})
    make_trainer(max_epochs=1, limit_val_batches=0).fit(algorithm, module)
    bare = Bare(**model or {}, spec=module.spec.to_dict())
    bare.build(module.spec)
    bare.load_state_dict(algorithm.state_dict())
    return bare, kept[0]


class Bare(PPO):
    """PPO that keeps its gradients in place of stepping."""

    def optimize(self, loss: torch.Tensor, optimizer: object = None) -> None:
        for parameter in self.parameters():
            parameter.grad = None
        loss.backward()
        self.gradients = [p.grad.clone() for p in self.parameters() if p.grad is not None]


def test_masked_rows_change_no_gradient_no_statistic_and_no_metric(make_trainer) -> None:
    data = {"env_kwargs": {"mode": "NextStep"}, "vectorization": "native", "num_envs_per_env_runner": 4}
    model = {
        "minibatch_size": 4 * 24,
        "num_epochs": 1,
        "normalize_observations": True,
        "normalize_returns": True,
        "entropy_coef": 0.1,
    }
    algorithm, rollout = collect(make_trainer, counter_vector, data | {"rollout_length": 24}, model)
    assert (~rollout["mask"]).sum() > 10
    spoiled = rollout.clone()
    bad = ~spoiled["mask"]
    spoiled["action"][bad] = 1 - spoiled["action"][bad]
    spoiled["action_log_prob"][bad] = -20.0
    other = copy.deepcopy(algorithm)
    first, second = algorithm.update(rollout), other.update(spoiled)
    for a, b in zip(algorithm.gradients, other.gradients):
        torch.testing.assert_close(a, b)
    for name in first:
        torch.testing.assert_close(torch.as_tensor(first[name]), torch.as_tensor(second[name]))
    real = rollout["observation"][rollout["mask"]]
    torch.testing.assert_close(algorithm.policy.normalizer.moments["/"].mean, real.mean(0))
    assert int(algorithm.policy.normalizer.moments["/"].count) == int(rollout["mask"].sum())
    assert int(algorithm.return_normalizer.count) == int(rollout["mask"].sum())


def test_next_step_mode_gives_the_gradient_of_its_real_rows_alone(make_trainer) -> None:
    data = {"env_kwargs": {"mode": "NextStep"}, "vectorization": "native", "num_envs_per_env_runner": 1}
    model = {"minibatch_size": 24, "num_epochs": 1, "normalize_returns": False}
    algorithm, rollout = collect(make_trainer, counter_vector, data | {"rollout_length": 24}, model)
    algorithm.update(rollout)
    masked = algorithm.gradients
    # The same transitions as an environment without reset rows would give them.
    keep = rollout["mask"][0]
    same = TensorDict(
        {k: v[:, keep] for k, v in rollout.items() if k in ("observation", "action", "action_log_prob")}, [1]
    )
    same["next"] = TensorDict({k: v[:, keep] for k, v in rollout["next"].items()}, [1])
    from lit_rl.rollout import next_observation

    following = next_observation(rollout)[:, keep]
    steps = same["next", "done"][0].nonzero()[:, 0]
    same["final_step"], same["final_observation"] = steps[None], following[:, steps]
    same["last_observation"] = rollout["last_observation"]
    same["policy_version"] = rollout["policy_version"][:, keep]
    other = Bare(**model | {"minibatch_size": int(keep.sum())}, spec=algorithm.spec.to_dict())
    other.build(algorithm.spec)
    other.load_state_dict(algorithm.state_dict())
    other.update(same)
    for a, b in zip(masked, other.gradients):
        torch.testing.assert_close(a, b)


def weights_of_a_run(**model) -> torch.Tensor:
    data = RolloutDataModule("CartPole-v1", max_env_steps=512, seed=0, **SMALL | {"rollout_length": 32})
    algorithm = PPO(**{"minibatch_size": 64, "num_epochs": 4, "normalize_returns": False, "lr": 1e-2} | model)
    quiet_trainer(limit_val_batches=0).fit(algorithm, data)
    return torch.cat([p.flatten() for p in algorithm.parameters()])


@pytest.fixture(scope="module")
def plain_weights() -> torch.Tensor:
    """What every option must change."""
    torch.set_num_threads(1)  # as in every test
    return weights_of_a_run()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip", 0.05),
        ("entropy_coef", 0.5),
        ("value_coef", 2.0),
        ("gamma", 0.5),
        ("gae_lambda", 0.1),
        ("normalize_advantage", False),
        ("normalize_returns", True),
        ("lr", 1e-4),
        ("lr_schedule", [[0, 1e-4]]),
        ("num_epochs", 1),
        ("minibatch_size", 32),
        ("max_grad_norm", 0.01),
        ("grad_clip_by", "value"),
        ("grad_clip_by", "norm"),
        ("clip_schedule", [[0, 0.01]]),
        ("entropy_coef_schedule", [[0, 0.5]]),
        ("value_clip", 0.01),
        ("kl_coef", 10.0),
        ("target_kl", 1e-6),
        ("network", MLP),  # the default, said aloud: changes nothing
    ],
)
def test_every_option_changes_what_is_learned(option: str, value: object, plain_weights: torch.Tensor) -> None:
    same = torch.equal(weights_of_a_run(**{option: value}), plain_weights)
    assert same == (option == "network")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0}, "lr=0: expected a number, above 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"gamma": 1.5}, "gamma=1.5: expected a number, at least 0 and at most 1"),
        ({"clip": -0.1}, "clip=-0.1"),
        ({"num_epochs": 0}, "num_epochs=0: expected a whole number of at least 1"),
        ({"minibatch_size": 2.5}, "minibatch_size=2.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"normalize_advantage": "no"}, "normalize_advantage='no': expected True or False"),
        ({"grad_clip_by": "norms"}, "grad_clip_by='norms': expected one of 'global_norm', 'norm', 'value'"),
        (
            {"clip_schedule": "sine"},
            "clip_schedule='sine': expected 'constant', 'linear', 'cosine' or [[env_step, value], ...].",
        ),
        ({"entropy_coef_schedule": [[5, -1.0]]}, "entropy_coef_schedule=-1.0: expected a number, at least 0"),
        ({"value_clip": 0}, "value_clip=0: expected a number, above 0"),
        ({"kl_coef": -1}, "kl_coef=-1: expected a number, at least 0"),
        ({"kl_target": 0}, "kl_target=0: expected a number, above 0"),
        ({"target_kl": 0}, "target_kl=0: expected a number, above 0"),
        ({"squash_actions": "yes"}, "squash_actions='yes': expected True or False"),
        ({"compile": 1}, "compile=1: expected True or False"),
        (
            {"lr_schedule": "sine"},
            "lr_schedule='sine': expected 'constant', 'linear', 'cosine' or [[env_step, value], ...].",
        ),
        ({"lr_schedule": [[0, 1.0], [0, 0.5]]}, "rising order"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        PPO(**options)
    assert words in str(caught.value)


def test_a_minibatch_larger_than_the_rollout_is_refused() -> None:
    with pytest.raises(OptionError, match="minibatch_size=256: expected at most the 128 rows"):
        train(CounterEnv, 256, {"minibatch_size": 256}, SMALL)


def test_observation_normalisation_of_a_discrete_space_is_refused() -> None:
    with pytest.raises(OptionError, match="normalize_observations"):
        train(IdentityEnv, 256, {"normalize_observations": True, "minibatch_size": 64}, SMALL)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"gradient_clip_val": 1.0}, "max_grad_norm"),
        ({"accumulate_grad_batches": 2}, "minibatch_size"),
    ],
)
def test_trainer_options_that_do_not_apply_name_the_algorithms_own(trainer: dict, words: str) -> None:
    with pytest.raises(LitRLError, match=words):
        train(CounterEnv, 256, {"minibatch_size": 64}, SMALL, **trainer)


def test_advantages_and_targets_of_a_rollout_by_hand(make_trainer) -> None:
    model = {
        "minibatch_size": 8, "gamma": 0.5, "gae_lambda": 1.0, "normalize_advantage": False, "normalize_returns": False,
        "num_epochs": 1,
    }  # fmt: skip
    algorithm, rollout = collect(make_trainer, CounterEnv, {"num_envs_per_env_runner": 1, "rollout_length": 8}, model)
    for parameter in algorithm.critic.parameters():
        parameter.data.zero_()
    algorithm.critic.head.linear.bias.data.fill_(8.0)  # V = 8 everywhere
    algorithm.update(rollout)
    # Episodes: rewards 1 2 (terminated) | 1 2 3 (truncated) | 1 2 3 (cut by the fragment's end; 4 steps long)
    # 1 + 2/2 = 2, 2 | 1 + 2/2 + 3/4 + 8/8 = 3.75, 2 + 3/2 + 8/4 = 5.5, 3 + 8/2 = 7 | the same
    expected = torch.tensor([[2.0, 2.0, 3.75, 5.5, 7.0, 3.75, 5.5, 7.0]])
    torch.testing.assert_close(rollout["value_target"], expected)
    torch.testing.assert_close(rollout["advantage"], expected - 8.0)


def test_the_observation_statistics_change_only_after_the_update(make_trainer) -> None:
    seen = []

    class Watch(PPO):
        def update(self, batch: TensorDict) -> dict:
            log_prob, _ = self.policy.evaluate(batch)
            seen.append((log_prob - batch["action_log_prob"]).abs().max().item())
            before = self.policy.normalizer.moments["/"].mean.clone()
            metrics = super().update(batch)
            assert not torch.equal(before, self.policy.normalizer.moments["/"].mean)
            return metrics

    data = RolloutDataModule("Pendulum-v1", max_env_steps=1024, seed=0, **SMALL)
    algorithm = Watch(minibatch_size=64, normalize_observations=True)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    assert len(seen) == 8 and max(seen) < 1e-4


class Watched(PPO):
    """Notes what each loss was computed with."""

    def loss(self, minibatch: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = getattr(self, "seen", [])
        self.seen.append((self.env_steps_done, float(self.clip.value), float(self.entropy_coef.value)))
        return super().loss(minibatch)


def test_clip_and_entropy_follow_their_schedules(make_trainer) -> None:
    model = {
        "minibatch_size": 64, "num_epochs": 1, "clip": 0.4, "clip_schedule": "linear", "entropy_coef": 0.9,
        "entropy_coef_schedule": [[0, 0.1], [256, 0.3]],
    }  # fmt: skip
    data = RolloutDataModule("CartPole-v1", max_env_steps=512, seed=0, **SMALL)
    algorithm = Watched(**model)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    steps, clips, entropies = zip(*algorithm.seen[::2])  # two minibatches in each rollout of 128
    assert steps == (0, 128, 256, 384)
    assert clips == pytest.approx((0.4, 0.3, 0.2, 0.1))
    assert entropies == pytest.approx((0.1, 0.2, 0.3, 0.3))


@pytest.mark.parametrize("name", ["clip_schedule", "entropy_coef_schedule"])
def test_a_linear_schedule_without_a_budget_is_refused(make_trainer, name: str) -> None:
    data = RolloutDataModule("CartPole-v1", rollouts_per_epoch=1, seed=0, **SMALL)
    with pytest.raises(OptionError, match=f"{name}='linear': expected a budget to end at"):
        make_trainer(max_epochs=1).fit(PPO(minibatch_size=64, **{name: "linear"}), data)


def test_an_update_ends_after_the_step_that_went_too_far(make_trainer) -> None:
    def steps(**model) -> tuple[int, dict]:
        data = RolloutDataModule("CartPole-v1", max_env_steps=512, seed=0, **SMALL)
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(PPO(minibatch_size=64, num_epochs=4, lr=1e-2, **model), data)
        return trainer.global_step, trainer.callback_metrics

    whole, metrics = steps()
    assert whole == 4 * 4 * 2 and "optim/gradient_steps" not in metrics
    stopped, metrics = steps(target_kl=0.01)
    assert 4 <= stopped < whole
    assert 1 <= metrics["optim/gradient_steps"] <= 8
    few, metrics = steps(target_kl=1e-9)
    assert few < 4 * 3  # the first step of each update has a divergence of 0
    assert metrics["policy/kl"] > 1e-9


def test_the_penalty_adapts_to_the_divergence_it_finds(make_trainer, tmp_path) -> None:
    def weights(path: str | None = None, steps: int = 512, **model) -> tuple[PPO, list[float]]:
        seen = []

        class Watch(PPO):
            def update(self, batch: TensorDict) -> dict:
                metrics = super().update(batch)
                seen.append((metrics["policy/kl_coef"], float(metrics["policy/kl"])))
                return metrics

        data = RolloutDataModule("CartPole-v1", max_env_steps=steps, seed=0, **SMALL)
        options = {"minibatch_size": 128, "num_epochs": 1, "kl_coef": 2.0}
        algorithm, trainer = Watch(**options | model), make_trainer()
        trainer.fit(algorithm, data, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return algorithm, [coef for coef, _ in seen]

    # One step from the policy that acted: its own divergence is 0, which is too small.
    algorithm, seen = weights()
    assert seen == [2.0, 1.0, 0.5, 0.25] and float(algorithm.kl_coef) == 0.125
    algorithm, seen = weights(tmp_path / "last.ckpt", steps=768)
    assert seen == [0.125, 0.0625]
    # Another weight than the run before had, or another run from its weights, begins with what it is told.
    assert weights(tmp_path / "last.ckpt", steps=1024, kl_coef=5.0)[1] == [5.0, 2.5]
    again = type(algorithm).load_from_checkpoint(tmp_path / "last.ckpt", kl_coef=3.0)
    make_trainer(limit_val_batches=0).fit(again, RolloutDataModule("CartPole-v1", max_env_steps=256, seed=0, **SMALL))
    assert float(again.kl_coef) == 0.75  # two updates
    bare = PPO(kl_coef=1.0, kl_target=0.01, num_epochs=2, spec=algorithm.spec.to_dict())
    bare.build(algorithm.spec)
    rows = torch.zeros(2, 5)
    for kl, expected in (
        ([0.0, 0.05], 1.5),
        ([0.02, 0.02], 1.5),
        ([0.003, 0.005], 0.75),
        ([0.01, 0.01], 0.75),
    ):
        rows[:, 3] = torch.tensor(kl)
        bare.adapt_kl_coef(bare.kl_coef, list(rows))
        assert float(bare.kl_coef) == pytest.approx(expected)


def test_the_penalty_adapts_to_as_many_steps_as_make_a_pass_also_where_target_kl_ends_an_update(make_trainer) -> None:
    taken: list[tuple[int, int]] = []

    class Watch(PPO):
        def adapt_kl_coef(self, kl_coef: torch.Tensor, terms: list[torch.Tensor]) -> None:
            taken.append((len(terms), self.hp.num_epochs))
            super().adapt_kl_coef(kl_coef, terms)

    algorithm = Watch(lr=1e-2, minibatch_size=32, num_epochs=10, kl_coef=0.2, target_kl=0.01)
    data = RolloutDataModule("CartPole-v1", max_env_steps=256 * 4, seed=0, **SMALL)
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    per_pass = data.rollout_shape[0] * data.rollout_shape[1] // 32
    assert per_pass > 1 and {number for number, _ in taken} <= set(range(1, per_pass + 1))
    assert max(number for number, _ in taken) == per_pass  # though updates end before their ten passes


@pytest.mark.parametrize("options", [{"squash_actions": True}, {"log_std_init": -2.0}])
def test_options_of_box_actions_are_refused_for_others(options: dict, make_trainer) -> None:
    (name, value), *_ = options.items()
    data = RolloutDataModule("CartPole-v1", max_env_steps=256, **SMALL)
    with pytest.raises(OptionError, match=rf"{name}={value}: expected a Box action, got Discrete\(2\)"):
        make_trainer(limit_val_batches=0).fit(PPO(**options), data)


def test_a_checkpoint_of_squashed_actions_is_refused_without_squashing(make_trainer, tmp_path) -> None:
    def fit(squash: bool, path: str | None = None) -> None:
        data = RolloutDataModule("Pendulum-v1", max_env_steps=512, seed=0, **SMALL)
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(PPO(minibatch_size=64, num_epochs=1, squash_actions=squash), data, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "squashed.ckpt")

    fit(squash=True)
    with pytest.raises(CheckpointError, match="made with squash_actions=True, this one with squash_actions=False"):
        fit(squash=False, path=tmp_path / "squashed.ckpt")


def test_the_penalty_is_the_divergence_times_its_weight(make_trainer) -> None:
    model = {"minibatch_size": 128, "num_epochs": 1}
    algorithm, rollout = collect(make_trainer, CounterEnv, SMALL, model)
    rollout["advantage"], rollout["value_target"] = torch.ones(8, 16), torch.zeros(8, 16)
    rollout["action_log_prob"] -= 0.1  # the ratio is e^0.1
    (minibatch,) = algorithm.minibatches(rollout, None)
    plain, terms = algorithm.loss(minibatch)
    algorithm.kl_coef = torch.tensor(3.0)
    penalised, _ = algorithm.loss(minibatch)
    assert float(terms[3]) == pytest.approx(np.exp(0.1) - 1 - 0.1, rel=1e-3)
    assert float(penalised - plain) == pytest.approx(3 * float(terms[3]), rel=1e-3)


def test_the_value_may_move_no_further_than_its_clip(make_trainer) -> None:
    model = {"minibatch_size": 128, "num_epochs": 1, "value_clip": 0.5}
    algorithm, rollout = collect(make_trainer, CounterEnv, SMALL, model)
    algorithm.update(rollout)
    assert rollout["state_value"].shape == (8, 16)
    torch.testing.assert_close(rollout["state_value"], algorithm.values(rollout)[0])
    rollout["state_value"] -= 2.0  # has moved by 2, towards a target of
    rollout["value_target"] = algorithm.values(rollout)[0] + 3.0
    (minibatch,) = algorithm.minibatches(rollout, None)
    _, terms = algorithm.loss(minibatch)
    assert float(terms[1]) == pytest.approx(0.5 * (2 - 0.5 + 3) ** 2, rel=1e-4)


@pytest.mark.parametrize(("by", "bound"), [("global_norm", 0.1), ("norm", 0.05), ("value", 0.01)])
def test_gradients_are_bounded_as_torch_does_it(make_trainer, by: str, bound: float) -> None:
    kept = []

    class Keep(PPO):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            kept.append([parameter.grad.clone() for parameter in self.parameters()])

    def gradients(**model) -> list[torch.Tensor]:
        kept.clear()
        data = RolloutDataModule("CartPole-v1", max_env_steps=128, seed=0, **SMALL)
        make_trainer(limit_val_batches=0).fit(Keep(minibatch_size=128, num_epochs=1, **model), data)
        return kept[0]

    free, bounded = gradients(max_grad_norm=None), gradients(max_grad_norm=bound, grad_clip_by=by)
    parameters = [torch.nn.Parameter(gradient) for gradient in free]
    for parameter, gradient in zip(parameters, free):
        parameter.grad = gradient.clone()
    if by == "value":
        torch.nn.utils.clip_grad_value_(parameters, bound)
    for group in [parameters] if by == "global_norm" else [[p] for p in parameters] if by == "norm" else []:
        torch.nn.utils.clip_grad_norm_(group, bound)
    for parameter, gradient in zip(parameters, bounded):
        torch.testing.assert_close(parameter.grad, gradient)
    assert any(not torch.equal(gradient, before) for gradient, before in zip(bounded, free))


def test_squashed_actions_stay_inside_and_learn() -> None:
    model = {
        "lr": 1e-2, "lr_schedule": "linear", "minibatch_size": 64, "gamma": 0.0, "normalize_observations": True,
        "squash_actions": True,
    }  # fmt: skip
    algorithm, data, return_ = train(TargetEnv, 4_000, model, SMALL)
    assert return_ > -0.05  # acting at random costs about 0.7
    space = data.spec.action_space
    obs = np.full((100, *data.spec.observation_space.shape), 50, np.float32)
    action = algorithm.policy.to_env(algorithm.policy.sample(obs)[0])
    assert (action >= space.low).all() and (action <= space.high).all()


@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_the_first_standard_deviation_is_the_one_asked_for(make_trainer, state_dependent_std: bool) -> None:
    model = {"log_std_init": -2, "state_dependent_std": state_dependent_std}
    algorithm, rollout = collect(make_trainer, TargetEnv, SMALL, model | {"minibatch_size": 64})
    log_std = algorithm.policy(rollout["observation"])[..., 1:]
    torch.testing.assert_close(log_std, torch.full_like(log_std, -2.0), atol=0.1, rtol=0)
    assert rollout["action"].std() < 0.3


def test_one_pass_over_one_minibatch_is_advantage_actor_critic(make_trainer) -> None:
    """docs/ppo.md says how A2C is had."""
    model = {
        "num_epochs": 1, "minibatch_size": 128, "gae_lambda": 1.0, "normalize_advantage": False, "entropy_coef": 0.01,
        "value_coef": 0.5, "max_grad_norm": None,
    }  # fmt: skip
    algorithm, rollout = collect(make_trainer, CounterEnv, SMALL, model)
    algorithm.update(rollout)
    for parameter in algorithm.parameters():
        parameter.grad = None
    log_prob, entropy = algorithm.policy.evaluate(rollout)
    value = algorithm.value(rollout["observation"])
    target = rollout["value_target"]
    loss = -(log_prob * (target - value.detach())) + 0.25 * (value - target).square() - 0.01 * entropy
    loss.mean().backward()
    for found, parameter in zip(algorithm.gradients, algorithm.parameters()):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)


def test_explained_variance_is_one_for_a_perfect_critic_and_ignores_masked_rows() -> None:
    target = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.ones(3), target) == 0
    mask = torch.tensor([True, True, False])
    assert explained_variance(torch.tensor([1.0, 2.0, 99.0]), target, mask) == 1
    assert np.isfinite(explained_variance(torch.ones(3), torch.ones(3)))
