"""Warnings in plain words: when they come, that they come once, and that a healthy run has none."""

from types import SimpleNamespace
from typing import Any

import pytest
from envs import ClockEnv
from gymnasium import spaces

from lit_rl import PPO, Diagnostics, RolloutDataModule
from lit_rl.callbacks.diagnostics import entropy_share
from lit_rl.errors import OptionError

HEALTHY = {
    "policy/entropy": 0.5,
    "policy/kl": 0.01,
    "value/explained_variance": 0.4,
    "optim/skipped_updates": 0.0,
}
SICK = {
    "policy/entropy": 0.001,
    "policy/kl": 0.3,
    "value/explained_variance": -0.5,
    "optim/skipped_updates": 2.0,
}


def feed(diagnostics: Diagnostics, batches: list[dict[str, float]], start: int = 0) -> None:
    """One call a batch, of 10 env steps in a budget of 1,000; training returns rise to 100 and stay a little lower."""
    for i, metrics in enumerate(batches, start=start):
        algorithm: Any = SimpleNamespace(
            spec=SimpleNamespace(action_space=spaces.Discrete(2)),
            policy=None,
            budget=1000,
            env_steps_done=10 * (i + 1),
            clock=10 * (i + 1),
        )
        returned = {"rollout/return_mean": 100.0 if i == 1 else 50.0 + i % 3}
        trainer: Any = SimpleNamespace(callback_metrics=returned | metrics, is_global_zero=True)
        diagnostics.on_train_batch_end(trainer, algorithm)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lit_rl.callbacks.diagnostics"]


def test_a_constant_is_no_bad_critic_where_all_returns_are_equal(caplog) -> None:
    equal = HEALTHY | {"value/explained_variance": -0.5, "rollout/return_mean": 1.0}
    feed(Diagnostics(window=5, still_share=1.0), [equal] * 20)
    behind = HEALTHY | {"value/explained_variance": -2.8e-5}  # but for rounding as good as a constant
    feed(Diagnostics(window=5), [HEALTHY] * 10 + [behind] * 10)
    assert messages(caplog) == []


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("policy/entropy", ["all but stopped exploring", "policy/entropy=0.001", "entropy_coef"]),
        ("policy/kl", ["changes too much", "policy/kl=0.3, more than 0.1", "target_kl"]),
        ("value/explained_variance", ["worse than a constant", "value/explained_variance=-0.5", "normalize_returns"]),
        ("optim/skipped_updates", ["2 gradient steps were skipped", "max_grad_norm"]),
    ],
)
def test_each_kind_is_said_once_until_it_recovers(caplog, metric: str, words: list[str]) -> None:
    diagnostics, sick = Diagnostics(window=5), HEALTHY | {metric: SICK[metric]}
    feed(diagnostics, [HEALTHY] * 10)
    assert messages(caplog) == []
    feed(diagnostics, [sick] * 20, start=10)
    (message,) = messages(caplog)
    assert all(word in message for word in words), message
    assert message.startswith("After ")
    if metric == "optim/skipped_updates":  # a total: it recovers while no more are skipped, which it has by now
        feed(diagnostics, [HEALTHY | {metric: 3.0}] * 2, start=30)
    else:
        feed(diagnostics, [HEALTHY] * 10 + [sick] * 10, start=30)
    assert len(messages(caplog)) == 2


def test_one_bad_batch_is_no_reason_to_warn(caplog) -> None:
    batches = [HEALTHY] * 10 + [HEALTHY | {"policy/kl": 50.0, "value/explained_variance": -90.0}] + [HEALTHY] * 10
    feed(Diagnostics(window=5), batches)
    assert messages(caplog) == []


def test_a_critic_of_equal_episodes_is_not_blamed_while_returns_are_at_their_best(caplog) -> None:
    diagnostics = Diagnostics(window=5)
    algorithm: Any = SimpleNamespace(budget=1000, env_steps_done=10, spec=None, policy=None)
    for i in range(20):
        metrics = {"value/explained_variance": -2.0, "rollout/return_mean": float(i)}
        diagnostics.on_train_batch_end(SimpleNamespace(callback_metrics=metrics, is_global_zero=True), algorithm)  # type: ignore[arg-type]
    assert messages(caplog) == []


def test_what_was_said_is_not_said_again_after_a_resume(caplog) -> None:
    first, second = Diagnostics(window=5), Diagnostics(window=5)
    feed(first, [SICK] * 10)
    said = len(messages(caplog))
    assert said == 4
    second.load_state_dict(first.state_dict())
    feed(second, [SICK] * 10, start=10)
    assert len(messages(caplog)) == said


def test_returns_that_stay_where_they_are_are_told_in_a_run(make_trainer, caplog) -> None:
    data = RolloutDataModule(ClockEnv, num_envs_per_env_runner=2, rollout_length=8, max_env_steps=640, seed=0)
    make_trainer(callbacks=[Diagnostics(window=5)], limit_val_batches=0).fit(PPO(minibatch_size=16, num_epochs=1), data)
    (message,) = [text for text in messages(caplog) if "returns have not moved" in text]
    assert "stayed between 5 and 5 for 160 env steps" in message


def test_steps_that_are_far_too_large_are_told_in_a_run(make_trainer, caplog) -> None:
    data = RolloutDataModule("CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=2560, seed=0)
    trainer = make_trainer(callbacks=[Diagnostics(window=5)], limit_val_batches=0)
    trainer.fit(PPO(lr=0.1, minibatch_size=64, num_epochs=10), data)
    assert any("changes too much" in text or "stopped exploring" in text for text in messages(caplog))


@pytest.mark.slow
def test_the_cartpole_recipe_has_no_warning(caplog) -> None:
    from lit_rl import cli

    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
    cli.main(["fit", "--config", "ppo_cartpole", "--trainer.callbacks", "[{class_path: Diagnostics}]", *quiet])
    assert messages(caplog) == []


@pytest.mark.parametrize(
    ("space", "entropy", "squashed", "share"),
    [
        (spaces.Discrete(4), 0.6931471805599453, False, 0.5),
        (spaces.MultiDiscrete([2, 8]), 0.6931471805599453, False, 0.25),
        (spaces.MultiBinary(2), 0.6931471805599453, False, 0.5),
        (spaces.Box(-1.0, 3.0, (2,)), 0.0, False, 0.25),  # e^0 = 1 of 4 in each dimension
        (spaces.Box(-100.0, 100.0, (2,)), 0.0, True, 0.5),  # of [-1, 1]
        (spaces.Box(-float("inf"), 1.0, (2,)), 0.0, False, None),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0.0, 1.0)}), 0.0, False, None),
    ],
)
def test_entropy_is_measured_against_random_actions(space: Any, entropy: float, squashed: bool, share: Any) -> None:
    assert entropy_share(space, entropy, squashed) == (None if share is None else pytest.approx(share))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match=r"max_kl=0: expected a number, above 0"):
        Diagnostics(max_kl=0)
    with pytest.raises(OptionError, match=r"window=0: expected a whole number"):
        Diagnostics(window=0)
