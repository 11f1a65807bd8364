"""`lit-rl evaluate`, and the callback OfflineEvaluation: a checkpoint and recorded episodes in, estimates out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quiet_trainer

from lit_rl import (
    BC,
    DQN,
    PPO,
    Evaluation,
    MultiAgent,
    OfflineDataModule,
    OfflineEvaluation,
    Record,
    RolloutDataModule,
    cli,
    evaluate_offline,
    load_policy,
)
from lit_rl.errors import OptionError
from lit_rl.evaluation import policy_rows
from lit_rl.evaluation.estimating import estimate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of a PPO that draws its actions, with its checkpoint, and a checkpoint of a DQN."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.set_num_threads(1)
    algorithm = PPO(gamma=0.9)
    data = RolloutDataModule(
        "CartPole-v1",
        rollout_length=16,
        max_env_steps=128,
        seed=1,
        evaluation=Evaluation(episodes=24, deterministic=False),
    )
    trainer = quiet_trainer(limit_val_batches=0, callbacks=[Record(folder / "episodes", evaluation=False)])
    trainer.fit(algorithm, data)
    trainer.save_checkpoint(folder / "ppo.ckpt")
    trainer.predict(algorithm, data)
    data = OfflineDataModule(folder / "episodes", max_updates=1, seed=1)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(DQN(), data)
    trainer.save_checkpoint(folder / "dqn.ckpt")
    return folder


def run(folder: Path, *args: str) -> None:
    cli.main(["evaluate", str(folder / "ppo.ckpt"), str(folder / "episodes"), *args])


def test_a_policy_is_worth_what_its_own_episodes_are(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run(folder, "--estimators", "is", "pdis", "wis", "wpdis", "-o", "out.json")
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(Path("out.json").read_text())
    assert (result["gamma"], result["judged"], result["behavior"]) == (0.9, "sampled", "recorded")
    assert result["num_episodes"] == 24
    for each in result["estimates"]:
        assert each["value"] == pytest.approx(result["data"]["value"], rel=1e-3)
        assert each["effective_sample_size"] == pytest.approx(24, rel=1e-3)
        assert each["low"] < each["value"] < each["high"]
        assert each["warning"] is None
    at = next(i for i, line in enumerate(lines) if line.startswith("data "))
    assert lines[at - 3] == "Values: discounted returns, gamma 0.9"
    names = [line.split()[0] for line in lines[at:-1]]
    assert names == ["data", "IS", "PDIS", "WIS", "WPDIS"]
    assert lines[-1] == "Figures: out.json"


def test_all_that_can_judge_is_said_and_why_the_rest_is_not(folder: Path, capsys: pytest.CaptureFixture) -> None:
    quick = ["--num_updates", "2", "--gamma", "0.5"]
    run(folder, *quick)
    shown = capsys.readouterr().out
    for name in ("IS ", "WPDIS ", "DR ", "FQE (sampled) ", "FQE (greedy) "):
        assert f"\n{name}" in shown
    cli.main(["evaluate", str(folder / "dqn.ckpt"), str(folder / "episodes"), *quick])
    shown = capsys.readouterr().out
    assert "FQE (greedy) " in shown
    assert "FQE (sampled)" not in shown
    assert "Not estimated: is, pdis, wis, wpdis, dr. importance sampling" in shown
    cli.main(["evaluate", str(folder / "dqn.ckpt"), str(folder / "episodes"), *quick, "--epsilon", "0.3"])
    shown = capsys.readouterr().out
    assert "Judged by importance sampling: the policy, epsilon-greedy; recorded densities" in shown
    assert "FQE (epsilon-greedy) " in shown


def test_warnings_are_below_the_table(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["evaluate", str(folder / "dqn.ckpt"), str(folder / "episodes"), "--estimators", "wis", "is",
              "--epsilon", "0.001"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("! WIS, IS: ")
    assert "the interval says nothing" in lines[-1]
    assert next(line for line in lines if line.startswith("WIS ")).endswith(" !")


def test_a_fit_is_said(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_rows, "FIT_UPDATES", 20)
    run(folder, "--estimators", "wis", "--behavior", "fit")
    assert "fitted densities of the actions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--estimators", "dm"], "estimators=['dm']: expected a list of 'is', 'pdis', 'wis', 'wpdis', 'dr', 'fqe'."),
        (["--behavior", "guess"], "behavior='guess': expected one of 'recorded', 'fit'."),
        (["--gamma", "2"], "gamma=2.0: expected a number, at least 0 and at most 1."),
        (["--preset", "other"], "preset='other': expected one of 'rllib', 'd4rl', 'lerobot'"),
        (["-o", "out.csv"], "output='out.csv': expected a name that ends in .json."),
        (["-o", "none/out.json", "--estimators", "is"], "output='none/out.json' cannot be written: "),
    ],
)
def test_bad_options_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture, args: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(folder, *args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"lit-rl: error: {words}")
    assert "\n" not in error


def test_episodes_of_another_environment_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    data = RolloutDataModule("MountainCar-v0", seed=1, evaluation=Evaluation(episodes=1))
    quiet_trainer(callbacks=[Record("other")]).predict(PPO(), data)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(folder / "ppo.ckpt"), "other"])
    assert "the episodes have the observation space" in capsys.readouterr().err


def test_several_agents_and_a_missing_gamma_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    data = RolloutDataModule(
        "agent_envs:LoggedAgents",
        env_kwargs={"mode": "together"},
        rollout_length=8,
        max_env_steps=64,
        seed=1,
        evaluation=Evaluation(episodes=1),
    )
    trainer = quiet_trainer(limit_val_batches=0, callbacks=[Record("agents", evaluation=False)])
    algorithm = MultiAgent({"one": PPO()}, policy_mapping="one")
    trainer.fit(algorithm, data)
    trainer.save_checkpoint("agents.ckpt")
    trainer.predict(algorithm, data)
    for args, words in (
        (["agents.ckpt", "agents"], "Checkpoint agents.ckpt does not say what gamma is: expected --gamma"),
        (["agents.ckpt", "agents", "--gamma", "0.9"], "agents. Offline evaluation judges one policy"),
        (["agents.ckpt", str(folder / "episodes"), "--gamma", "0.9"], "policy=PolicySet: expected one policy."),
    ):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", *args])
        assert words in capsys.readouterr().err


# --- while training -------------------------------------------------------------------------------------------------


def data_of(folder: Path, **options: Any) -> OfflineDataModule:
    given = {"max_updates": 4, "updates_per_batch": 1, "batches_per_epoch": 2, "validation_fraction": 0.5, "seed": 3}
    return OfflineDataModule(folder / "episodes", **given | options)


def test_held_out_episodes_judge_the_policy_in_each_validation(folder: Path) -> None:
    callback, algorithm, data = OfflineEvaluation(["wis", "fqe"], num_updates=3), BC(gamma=0.8), data_of(folder)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(algorithm, data)
    logged = dict(trainer.callback_metrics)
    assert {"eval/wis", "eval/fqe_sampled", "eval/fqe_greedy", "eval/log_prob"} <= set(logged)
    trainer.save_checkpoint("bc.ckpt")
    held_out = np.unique(np.searchsorted(data.recorded.begins, data.feed().held_out.rows, side="right") - 1)
    assert len(held_out) == 12
    options = {"gamma": 0.8, "estimators": ["wis", "fqe"], "num_updates": 3, "seed": 3}
    expected = estimate(load_policy("bc.ckpt"), data.recorded.only(held_out), **options)
    for name, value in expected.metrics.items():
        assert logged[f"eval/{name}"].item() == pytest.approx(value, rel=1e-5)
    whole = evaluate_offline(load_policy("bc.ckpt"), folder / "episodes", **options)
    assert whole.metrics["wis"] != pytest.approx(expected.metrics["wis"], rel=1e-5)
    found = trainer.validate(algorithm, data, verbose=False)[0]
    assert found["eval/wis"] == pytest.approx(expected.metrics["wis"], rel=1e-5)


def test_every_second_validation_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = []
    monkeypatch.setattr(BC, "log_evaluation", lambda self, values, now: at.append((now, sorted(values))))
    data = data_of(folder, max_updates=8)
    quiet_trainer(callbacks=[OfflineEvaluation(["wis"], every=2)]).fit(BC(), data)
    assert [now for now, names in at if names == ["eval/wis"]] == [2, 6]


def test_a_resumed_run_evaluates_in_the_same_validations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = []
    monkeypatch.setattr(BC, "log_evaluation", lambda self, values, now: at.append((now, sorted(values))))
    first = quiet_trainer(callbacks=[OfflineEvaluation(["wis"], every=2)])
    first.fit(BC(), data_of(folder, max_updates=2))
    first.save_checkpoint("first.ckpt")
    second = quiet_trainer(callbacks=[OfflineEvaluation(["wis"], every=2)])
    second.fit(BC(), data_of(folder, max_updates=6), ckpt_path="first.ckpt")
    assert [now for now, names in at if names == ["eval/wis"]] == [2, 6]


def test_training_is_the_same_with_evaluation(folder: Path) -> None:
    weights = []
    for callbacks in ([], [OfflineEvaluation(["wis", "fqe"], num_updates=2)]):
        algorithm = BC()
        torch.manual_seed(5)
        quiet_trainer(callbacks=callbacks).fit(algorithm, data_of(folder))
        weights.append(algorithm.policy.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_what_the_callback_cannot_judge_is_refused_before_training(folder: Path) -> None:
    for callback, algorithm, data, words in (
        (OfflineEvaluation(), DQN(), data_of(folder), r"OfflineEvaluation: wis: importance sampling .* Set epsilon"),
        (OfflineEvaluation(), BC(), data_of(folder, validation_fraction=0.0), r"expected an OfflineDataModule with a"),
        (OfflineEvaluation(), PPO(), RolloutDataModule("CartPole-v1"), r"got RolloutDataModule; expected an Offline"),
    ):
        with pytest.raises(OptionError, match=words):
            quiet_trainer(callbacks=[callback]).fit(algorithm, data)
        assert algorithm.updates_done == 0
    with pytest.raises(OptionError, match=r"estimators=\('dm',\): expected a list"):
        OfflineEvaluation(("dm",))
