"""`compile=True`: the same training as without, in one function."""

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from envs import CycleEnv, MaskedEnv
from gymnasium import spaces
from helpers import assert_same
from tensordict import TensorDict

from lit_rl import (
    APPO,
    CQL,
    DQN,
    IMPALA,
    IQL,
    MLP,
    PPO,
    SAC,
    TQC,
    DiscreteCQL,
    DreamerV3,
    Evaluation,
    LSTMNetwork,
    Rainbow,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.errors import DivergedError, OptionError

PPO_OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "lr_schedule": "linear", "minibatch_size": 24, "num_epochs": 2, "entropy_coef": 0.01, "kl_coef": 0.2,
    "clip_schedule": "linear", "entropy_coef_schedule": "linear", "value_clip": 0.2,
    "network": partial(MLP, hidden_sizes=[8]),
}  # fmt: skip
IMPALA_OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "lr_schedule": "linear", "value_coef_schedule": "linear", "entropy_coef_schedule": "linear",
    "network": partial(MLP, hidden_sizes=[8]), "normalize_returns": True, "max_grad_norm": 0.1,
}  # fmt: skip
SAC_OPTIONS: dict[str, Any] = {
    "lr": 1e-3, "tau": 0.1, "network": partial(MLP, hidden_sizes=[8]), "critic_hidden_sizes": [8, 8],
}  # fmt: skip
CASES: dict[str, Any] = {
    "PPO": (PPO, PPO_OPTIONS),
    "PPO, shared": (PPO, {"minibatch_size": 24, "share_encoder": True, "grad_clip_by": "norm", "max_grad_norm": 0.1}),
    "PPO, normalised values": (PPO, PPO_OPTIONS | {"normalize_values": True}),
    "PPO, by value": (PPO, {"minibatch_size": 24, "grad_clip_by": "value", "max_grad_norm": 0.01}),
    "IMPALA": (IMPALA, IMPALA_OPTIONS),
    "IMPALA, RMSProp": (IMPALA, IMPALA_OPTIONS | {"optimizer": "rmsprop", "rmsprop_eps": 1e-3, "share_encoder": True}),
    "APPO": (APPO, IMPALA_OPTIONS | {"kl_coef": 0.2, "normalize_observations": True, "normalize_advantage": True}),
    "APPO, by GAE": (APPO, {"vtrace": False, "tau": 0.5, "target_update_interval": 1}),
    "DQN": (DQN, {"lr": 1e-2, "target_update_interval": 7, "network": partial(MLP, hidden_sizes=[8])}),
    "Rainbow": (
        Rainbow,
        {"lr": 1e-3, "network": partial(MLP, hidden_sizes=[8]), "v_min": 0, "v_max": 5, "num_atoms": 11},
    ),
    "DreamerV3": (
        DreamerV3,
        {"size": "nano", "blocks": 2, "sequence_length": 8, "horizon": 3, "lr": 1e-3, "warmup": 10}
        | {"max_grad_norm": 50.0},
    ),
    "SAC": (SAC, SAC_OPTIONS | {"critic_lr": 2e-3, "alpha_lr": 5e-3, "lr_schedule": "linear"}),
    "SAC, shared": (SAC, SAC_OPTIONS | {"share_encoder": True, "actor_lr": 1e-3, "max_grad_norm": 1.0}),
    "SAC, discrete": (SAC, SAC_OPTIONS),
    "TQC": (TQC, SAC_OPTIONS | {"num_quantiles": 5, "learn_alpha": False}),
    "CQL": (CQL, SAC_OPTIONS | {"num_actions": 3, "lagrangian": True, "bc_iters": 5}),
    "DiscreteCQL": (DiscreteCQL, {"lr": 1e-2, "network": partial(MLP, hidden_sizes=[8])}),
    "IQL": (IQL, SAC_OPTIONS | {"actor_lr": 2e-3, "value_lr": 5e-3}),
}


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled function is run as it is written."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def fit(make_trainer: Any, case: str, *, path: Any = None, steps: int = 320, **options: Any) -> tuple[Any, L.Trainer]:
    """`steps` / 64 updates of PPO, of two minibatches of 24 rows and one of 16; `steps` / 8 of IMPALA and APPO;
    (`steps` - 80) / 4 of the others.
    """
    cls, own = CASES[case]
    more: dict[str, Any] = {
        "max_env_steps": steps,
        "evaluation": Evaluation(episodes=2),
        "num_envs_per_env_runner": 2,
        "seed": 0,
    }
    if cls in (PPO, IMPALA, APPO):
        data: Any = RolloutDataModule(CycleEnv, rollout_length=32 if cls is PPO else 4, **more)
    else:
        env = CycleEnv if case in ("DQN", "Rainbow", "SAC, discrete", "DiscreteCQL", "DreamerV3") else "Pendulum-v1"
        data = ReplayDataModule(
            env, learning_starts=80, batch_size=16, buffer_size=400, env_steps_per_batch=40, update_to_data=0.25,
            **more,
        )  # fmt: skip
    algorithm, trainer = cls(**copy.deepcopy(own) | options), make_trainer()
    trainer.fit(algorithm, data, ckpt_path=path)
    return algorithm, trainer


@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_give_the_weights_of_eager_ones(make_trainer, in_python: None, case: str) -> None:
    eager, trainer = fit(make_trainer, case, steps=160)
    compiled, other = fit(make_trainer, case, steps=160, compile=True)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert trainer.global_step == other.global_step > 10
    for name in ("optim/grad_norm", "optim/lr", "loss/value"):
        torch.testing.assert_close(
            trainer.callback_metrics[name], other.callback_metrics[name], rtol=1e-2, atol=1e-4, msg=name
        )
    first, second = (each.optimizers[0].state_dict()["state"] for each in (trainer, other))
    assert first.keys() == second.keys()
    for index, state in first.items():
        assert state["step"] == second[index]["step"]
        for key in state.keys() - {"step"}:
            torch.testing.assert_close(state[key], second[index][key], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("case", ["PPO", "APPO", "SAC", "SAC, discrete", "TQC"])
def test_what_is_compiled_is_what_is_written(make_trainer, case: str) -> None:
    options: dict[str, Any] = {"minibatch_size": 32} if case == "PPO" else {}
    steps = 320 if case == "PPO" else 120
    eager, trainer = fit(make_trainer, case, steps=steps, **options)
    compiled, other = fit(make_trainer, case, steps=steps, compile=True, **options)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert trainer.global_step == other.global_step


@pytest.mark.parametrize("case", ["PPO", "IMPALA, RMSProp", "APPO", "DQN", "SAC"])
def test_a_resumed_compiled_run_equals_an_unbroken_one(
    make_trainer, in_python: None, case: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"lr_schedule": "constant"}  # a run of half the budget follows another schedule
    if case == "PPO":  # whose batches end where the first run does, and which points do not follow the budget
        points = [[0, 1e-2], [192, 2e-3], [384, 1e-2]]
        options = {"lr_schedule": points, "clip_schedule": "constant", "entropy_coef_schedule": "constant"}
    elif case in ("IMPALA, RMSProp", "APPO"):
        options |= {"value_coef_schedule": "constant", "entropy_coef_schedule": "constant"}
    whole, trainer = fit(make_trainer, case, compile=True, **options)
    _, first = fit(make_trainer, case, compile=True, steps=192, **options)
    first.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert {state["step"].item() for state in checkpoint["optimizer_states"][0]["state"].values()} == {
        float(first.global_step)
    }
    resumed, again = fit(make_trainer, case, compile=True, path=tmp_path / "half.ckpt", **options)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert trainer.global_step == again.global_step


def test_a_compiled_run_goes_on_eagerly(make_trainer, in_python: None, tmp_path: Path) -> None:
    _, first = fit(make_trainer, "PPO", compile=True, steps=192)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, trainer = fit(make_trainer, "PPO", path=tmp_path / "half.ckpt")
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {trainer.global_step} and trainer.global_step > first.global_step
    _, trainer = fit(make_trainer, "PPO", path=tmp_path / "half.ckpt", compile=True)
    assert steps == {float(state["step"]) for state in trainer.optimizers[0].state.values()}


def test_the_policy_acts_by_the_weights_that_were_learned(make_trainer, in_python: None, tmp_path: Path) -> None:
    algorithm, trainer = fit(make_trainer, "PPO", compile=True)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    obs = torch.eye(5).numpy()
    assert (algorithm.policy.act(obs)[0] == load_policy(tmp_path / "last.ckpt").act(obs)[0]).all()
    assert torch.equal(
        torch.as_tensor(algorithm.policy.parameters_of(obs)).argmax(-1),
        algorithm.policy(torch.eye(5)).argmax(-1),
    )


def test_nested_actions_are_compiled_too(make_trainer, in_python: None) -> None:
    space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,)))
    weights = []
    for compile in (False, True):
        data = RolloutDataModule(
            MaskedEnv, env_kwargs={"action_space": space}, rollout_length=8, max_env_steps=256, seed=0
        )
        make_trainer(limit_val_batches=0).fit(algorithm := APPO(compile=compile, kl_coef=0.1), data)
        weights.append(torch.cat([p.flatten() for p in algorithm.policy.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-4)


def test_a_gradient_that_is_not_finite_changes_nothing(make_trainer, in_python: None) -> None:
    class Broken(PPO):
        losses = 0

        def loss(self, minibatch: TensorDict) -> Any:
            loss, terms = super().loss(minibatch)
            self.losses += 1
            return (loss * float("nan") if self.losses == 2 else loss), terms

        def gradient_step(self, batch: TensorDict) -> Any:
            before = [parameter.clone() for parameter in self.policy.parameters()]
            taken, terms = super().gradient_step(batch)
            equal = all(map(torch.equal, before, self.policy.parameters()))
            assert equal == (self.losses == 2) and taken != equal
            return taken, terms

    data = RolloutDataModule(CycleEnv, rollout_length=8, max_env_steps=128, evaluation=Evaluation(episodes=2), seed=0)
    algorithm, trainer = Broken(minibatch_size=8, compile=True), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data)
    assert trainer.callback_metrics["optim/skipped_updates"] == 1
    assert trainer.global_step == algorithm.losses - 1
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {trainer.global_step}


def test_a_loss_that_is_never_finite_ends_the_run(make_trainer, in_python: None) -> None:
    class Broken(PPO):
        def loss(self, minibatch: TensorDict) -> Any:
            loss, terms = super().loss(minibatch)
            return loss * float("nan"), terms

    data = RolloutDataModule(CycleEnv, rollout_length=8, max_env_steps=128, evaluation=Evaluation(episodes=2), seed=0)
    with pytest.raises(DivergedError, match="The loss is not finite"):
        make_trainer(limit_val_batches=0).fit(Broken(minibatch_size=8, compile=True), data)


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_skipped_too(make_trainer, in_python: None) -> None:
    class Infinite(PPO):
        def loss(self, minibatch: TensorDict) -> Any:
            loss, terms = super().loss(minibatch)
            return loss + torch.inf, terms

    data = RolloutDataModule(CycleEnv, rollout_length=8, max_env_steps=128, evaluation=Evaluation(episodes=2), seed=0)
    with pytest.raises(DivergedError, match="The loss is not finite"):
        make_trainer(limit_val_batches=0).fit(Infinite(minibatch_size=8, compile=True), data)


class OtherOptimizer(PPO):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(self.parameters(), lr=self.hp.lr)


class TwoEpsilons(SAC):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "eps": 1e-3})
        return optimizer


class Uncompilable(PPO):
    def loss(self, minibatch: TensorDict) -> Any:
        loss, terms = super().loss(minibatch)
        return (loss if float(loss) > 1e9 else 2 * loss), terms


@pytest.mark.parametrize(
    ("algorithm", "trainer", "words"),
    [
        (
            OtherOptimizer,
            {},
            r"compile=True: .* return torch.optim.Adam, lit_rl.*RMSprop or lit_rl.*LaProp, got torch.optim.*RMSprop",
        ),
        (PPO, {"precision": "bf16-mixed"}, "expected Trainer.precision='32-true'., got 'bf16-mixed'"),
        (partial(PPO, network=LSTMNetwork, sequence_length=8), {}, "compile=True: .* has memory"),
        (Uncompilable, {}, "the gradient step of Uncompilable with this network cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled_is_refused(make_trainer, algorithm: Any, trainer: dict, words: str) -> None:
    data = RolloutDataModule(CycleEnv, rollout_length=8, max_env_steps=128, evaluation=Evaluation(episodes=2), seed=0)
    with pytest.raises(OptionError, match=words):
        make_trainer(**trainer).fit(algorithm(minibatch_size=8, compile=True), data)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (TwoEpsilons, "compile=True: expected one eps for all parameters, got 1e-08 and 0.001"),
        (partial(SAC, network=LSTMNetwork, sequence_length=8), "compile=True: .* has memory"),
    ],
)
def test_what_cannot_be_compiled_of_sac_is_refused(make_trainer, algorithm: Any, words: str) -> None:
    data = ReplayDataModule("Pendulum-v1", learning_starts=80, batch_size=16, buffer_size=400, max_env_steps=160)
    with pytest.raises(OptionError, match=words):
        make_trainer().fit(algorithm(compile=True), data)


@pytest.mark.slow
def test_two_algorithms_in_one_process_are_compiled_apart(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is told not to check whether what it read has changed."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, fullgraph=True, backend="eager"))
    for value_coef in (0.5, 5.0):
        options = {"value_coef": value_coef, "max_grad_norm": None, "share_encoder": True}
        eager, _ = fit(make_trainer, "PPO", steps=64, **options)
        compiled, _ = fit(make_trainer, "PPO", steps=64, compile=True, **options)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=2e-4, msg=name)
