"""Policies that share a critic or an encoder: their algorithms take their gradient steps together."""

import copy
import functools
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import Namers
from helpers import assert_same, quiet_trainer
from tensordict import TensorDict
from torch import Tensor

from lit_rl import (
    APPO,
    DQN,
    IMPALA,
    MLP,
    PPO,
    Algorithm,
    Evaluation,
    GRUNetwork,
    LSTMNetwork,
    MultiAgent,
    Random,
    RolloutDataModule,
    load_policy,
)
from lit_rl.errors import CheckpointError, DivergedError, OptionError
from lit_rl.learner import steps as gradient_steps
from lit_rl.rollout import mask_of

PAIR = [["a", "b"]]
# Of a rollout's 64 rows "a" has minibatches of 24, 24 and 16, and of its 32 "b" such of 24 and 8.
SMALL: dict[str, Any] = {"minibatch_size": 24, "num_epochs": 2, "sequence_length": 4}
LSTM = functools.partial(LSTMNetwork, hidden_size=8)


def data(env: Any = Namers, **options: Any) -> RolloutDataModule:
    sizes = {"num_envs_per_env_runner": 4, "rollout_length": 16, "seed": 0, "evaluation": Evaluation(episodes=3)}
    return RolloutDataModule(env, **sizes | {"max_env_steps": 128} | options)


def fit(algorithm: MultiAgent, source: Any = None, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(limit_val_batches=0, **options)
    trainer.fit(algorithm, source or data(), ckpt_path=ckpt_path)
    return trainer


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Keeps:
    """An algorithm that keeps the minibatches of the step under way."""

    def loss(self, minibatch: TensorDict) -> tuple[Tensor, Tensor]:
        self.seen = minibatch.clone()
        return super().loss(minibatch)  # type: ignore[misc]

    def loss_by_hand(self, minibatch: TensorDict) -> Tensor:
        return super().loss(minibatch.exclude("row_count"))[0]  # type: ignore[misc]


class KeepingPPO(Keeps, PPO):
    pass


class KeepingIMPALA(Keeps, IMPALA):
    pass


class KeepingAPPO(Keeps, APPO):
    pass


class ByHand(L.Callback):
    """Holds the gradient of every step against that of the mean over the rows of all minibatches."""

    def __init__(self) -> None:
        self.took_part: list[list[str]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        seen = {i: x.__dict__.pop("seen") for i, x in module.algorithms.items() if "seen" in x.__dict__}
        self.took_part.append(list(seen))
        masks = {i: mask_of(minibatch) for i, minibatch in seen.items()}
        rows = {i: int(mask.sum()) for i, mask in masks.items()}
        loss = sum(rows[i] * module.algorithms[i].loss_by_hand(batch) for i, batch in seen.items()) / sum(rows.values())
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
            if gradient is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-7, rtol=1e-5)
        assert trainer.global_step == len(self.took_part) - 1


SHARED: dict[str, dict[str, Any]] = {
    "encoder": {"encoder_groups": PAIR},
    "critic": {"critic_groups": PAIR},
    "both": {"critic_groups": PAIR, "encoder_groups": PAIR},
}
CASES = {
    "PPO, encoder": (KeepingPPO, "encoder", SMALL),
    "PPO, critic": (KeepingPPO, "critic", SMALL),
    "PPO, both": (KeepingPPO, "both", SMALL | {"entropy_coef": 0.1, "kl_coef": 0.1, "normalize_observations": True}),
    "PPO, one network": (KeepingPPO, "both", SMALL | {"share_encoder": True}),
    "PPO, LSTM": (KeepingPPO, "both", SMALL | {"network": LSTM}),
    "PPO, LSTM without the critic": (KeepingPPO, "encoder", SMALL | {"network": LSTM}),
    "PPO, central": (KeepingPPO, "critic", SMALL | {"central_critic": "observations", "value_clip": 0.2}),
    "PPO, LSTM, critic by itself": (
        KeepingPPO, "both", SMALL | {"network": LSTM, "central_critic": "observations", "critic_network": LSTM},
    ),
    "IMPALA, both": (KeepingIMPALA, "both", {"optimizer": "rmsprop"}),
    "IMPALA, central": (KeepingIMPALA, "both", {"central_critic": "observations", "normalize_observations": True}),
    "APPO, GRU": (KeepingAPPO, "both", {"network": functools.partial(GRUNetwork, hidden_size=8), "kl_coef": 0.3}),
}  # fmt: skip


def pair(cls: Any = PPO, shared: str = "both", **options: Any) -> MultiAgent:
    return MultiAgent({"a": cls(**options), "b": cls(**options)}, **SHARED[shared])


# --- gradient steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_on_the_mean_over_the_rows_of_all_policies(case: str) -> None:
    cls, shared, options = CASES[case]
    by_hand, algorithm = ByHand(), pair(cls, shared, max_grad_norm=None, **options)
    trainer = fit(algorithm, callbacks=[by_hand])
    a, b = algorithm.algorithms.values()
    per_rollout = [["a", "b"]] * 4 + [["a"]] * 2 if cls is KeepingPPO else [["a", "b"]]
    assert by_hand.took_part == per_rollout * 2
    # Each parameter is in one optimizer, once, and was stepped once for each of its gradients.
    (optimizer,) = trainer.optimizers
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(stepped) == len(set(stepped))
    learned = {p for x in (a, b) for part in (x.policy, x.critic) for p in part.parameters()}
    assert set(stepped) == learned
    for what, one, another in (("encoder", a.policy.encoder, b.policy.encoder), ("critic", a.critic, b.critic)):
        assert (one is another) == (shared in (what, "both"))
        for parameter in one.parameters():
            assert optimizer.state[parameter]["step"] == len(by_hand.took_part)
    assert a.policy.head is not b.policy.head
    assert optimizer.state[b.policy.head.weight]["step"] == sum("b" in took for took in by_hand.took_part)


def test_policies_that_share_all_and_have_equal_heads_have_the_gradient_of_one_policy_with_all_rows() -> None:
    class Compare(L.Callback):
        compared = False

        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            a, b = (x.policy.head for x in module.algorithms.values())
            b.load_state_dict(a.state_dict())

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            if self.compared:  # the heads differ from the second step on
                return
            a, b = module.algorithms.values()
            rows = torch.cat([x.seen.exclude("row_count") for x in (a, b)])
            one = copy.deepcopy(a)
            one.zero_grad()
            one.loss_by_hand(rows).backward()
            for part in ("policy.encoder", "critic"):
                for p, expected in zip(a.get_submodule(part).parameters(), one.get_submodule(part).parameters()):
                    torch.testing.assert_close(p.grad, expected.grad, atol=1e-7, rtol=1e-5)
            heads = zip(*(x.policy.head.parameters() for x in (a, b, one)))
            for p, q, expected in heads:
                torch.testing.assert_close(p.grad + q.grad, expected.grad, atol=1e-7, rtol=1e-5)
            self.compared = True

    compare = Compare()
    fit(pair(KeepingPPO, max_grad_norm=None, minibatch_size=64), callbacks=[compare])  # 64 rows and 32
    assert compare.compared


def test_gradients_are_clipped_together() -> None:
    norms = []

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
            )

    fit(pair(max_grad_norm=1e-3, minibatch_size=32, num_epochs=1), callbacks=[Keep()])
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)


def test_a_policy_that_stops_early_drops_out() -> None:
    options = SMALL | {"max_grad_norm": None}
    policies = {"a": KeepingPPO(target_kl=1e-7, lr=1e-2, **options), "b": KeepingPPO(**options)}
    by_hand, algorithm = ByHand(), MultiAgent(policies, encoder_groups=PAIR)
    metrics = metrics_of(fit(algorithm, data(max_env_steps=64), callbacks=[by_hand]))
    taken = int(metrics["a/optim/gradient_steps"])
    assert 0 < taken < 4 and by_hand.took_part == [["a", "b"]] * taken + [["b"]] * (4 - taken)


def test_statistics_of_a_shared_critic_stay_what_they_are_until_all_have_taken_their_steps() -> None:
    options = SMALL | {"central_critic": "observations", "normalize_observations": True}
    policies = {"a": PPO(target_kl=1e-7, lr=1e-2, **options), "b": PPO(**options)}
    counts: list[list[int]] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            counts.append([])

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            critic = module.algorithms["b"].critic
            counts[-1].append(int(critic.normalizer.moments["observations/0"].count))
            targets.append(int(critic.head.moments.count))

    targets: list[int] = []
    algorithm = MultiAgent(policies, critic_groups=PAIR)
    fit(algorithm, callbacks=[Keep()])
    assert counts == [[0] * 4, [64 + 32] * 4]  # also when "a" has stopped
    assert targets == [64 + 32] * 4 + [2 * (64 + 32)] * 4  # the targets are those of both


def test_policies_without_rows_take_no_part() -> None:
    def late(agent: str, info: Any) -> str:
        return "c" if agent == "a" and info.number >= 4 else agent

    options = SMALL | {"minibatch_size": 4}
    policies = {policy_id: KeepingPPO(max_grad_norm=None, **options) for policy_id in "abc"}
    algorithm = MultiAgent(policies, policy_mapping=late, encoder_groups=[["a", "b", "c"]])
    by_hand, before = ByHand(), []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            before.append([x.policy.head.weight.detach().clone() for x in module.algorithms.values()])

    source = data(num_envs_per_env_runner=1, max_env_steps=64)
    fit(algorithm, source, callbacks=[by_hand, Keep()])
    first, last = by_hand.took_part[0], by_hand.took_part[-1]
    assert "c" not in first and "a" not in last and {"b", *first, *last} == {"a", "b", "c"}
    assert torch.equal(before[0][2], before[1][2])  # no rows, no step
    assert {x.updates_done for x in algorithm.algorithms.values()} == {4} == {algorithm.updates_done}


def test_policies_that_share_with_others_are_one_team_and_the_rest_learn_by_themselves() -> None:
    policies = {policy_id: PPO(**SMALL) for policy_id in "abcde"}
    algorithm = MultiAgent(
        policies, critic_groups=[["b", "a"]], encoder_groups=[["b", "c"]],
        policy_mapping=lambda agent, info: "abcde"[(info.number + (agent == "b")) % 5],
    )  # fmt: skip
    trainer = fit(algorithm, data(max_env_steps=256))
    a, b, c, d, _ = algorithm.algorithms.values()
    assert a.critic is b.critic is not c.critic and b.policy.encoder is c.policy.encoder is not a.policy.encoder
    assert len(trainer.optimizers) == 3 and d.host.steps is not a.host.steps is c.host.steps
    parameters = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(algorithm.parameters()))


def test_learning_rates_are_each_policys_own_and_those_of_what_is_shared_the_firsts() -> None:
    points = [[0, 1e-3], [128, 2e-3]]
    policies = {"a": PPO(lr_schedule=points, **SMALL), "b": PPO(lr=5e-3, **SMALL)}
    algorithm = MultiAgent(policies, encoder_groups=PAIR, critic_groups=PAIR)
    trainer = fit(algorithm)
    metrics = metrics_of(trainer)
    # Metrics say with which learning rates the last rollout was learned from.
    assert metrics["a/optim/lr"] == pytest.approx(1.5e-3) and metrics["b/optim/lr"] == pytest.approx(5e-3)
    lrs = {p: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    a, b = algorithm.algorithms.values()
    assert {lrs[p] for p in (*a.policy.parameters(), *a.critic.parameters())} == {2e-3}
    assert {lrs[p] for p in b.policy.head.parameters()} == {5e-3}


def test_what_makes_the_target_policy_follow_sees_the_shared_encoder() -> None:
    algorithm = pair(APPO, target_update_interval=1, lr=1e-2)
    fit(algorithm)
    for each in algorithm.algorithms.values():
        assert each.target.encoder is not each.policy.encoder
        assert_same(dict(each.target.state_dict()), dict(each.policy.state_dict()))


def test_a_shared_critic_gives_values_in_one_unit() -> None:
    algorithm = pair(shared="critic", **SMALL)
    fit(algorithm)
    a, b = (x.return_normalizer for x in algorithm.algorithms.values())
    assert a.count == b.count == 128 + 64 and a.var == b.var  # the rows of both
    assert a.running_return is not b.running_return
    a, b = (x.return_normalizer for x in pair_fitted("encoder").values())
    assert (int(a.count), int(b.count)) == (128, 64)


def pair_fitted(shared: str) -> Any:
    algorithm = pair(shared=shared, **SMALL)
    fit(algorithm)
    return algorithm.algorithms


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("cls", [PPO, APPO])
def test_two_policies_learn_with_one_encoder_and_one_critic(cls: type, seed: int) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "gamma": 0.0}
    if cls is PPO:
        options |= {"minibatch_size": 64, "num_epochs": 4}
    source = data(num_envs_per_env_runner=8, max_env_steps=8192, seed=seed, evaluation=Evaluation(episodes=20))
    algorithm = pair(cls, **options)
    fit(algorithm, source)
    (metrics,) = quiet_trainer().validate(algorithm, source, verbose=False)
    assert metrics["a/eval/return_mean"] > 3.6  # at best 4; a guess's is 4/3
    assert metrics["b/eval/return_mean"] > 1.8  # at best 2; a guess's is 2/3, and 0 is that of what "a" does


def test_rows_are_as_old_as_the_steps_of_the_team(recwarn: pytest.WarningsRecorder) -> None:
    fit(pair(IMPALA), data(num_reuses=40, max_env_steps=64))
    assert [each for each in recwarn if "gradient steps old" in str(each.message)]  # up to 39


@pytest.mark.parametrize("prefetch", [0, 2])
def test_runners_in_actors_act_by_the_shared_weights(monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.5)
    algorithm, probabilities = pair(KeepingIMPALA, lr=1e-2), []

    class Check(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            for policy_id, rollout in batch.items():
                newest = rollout["policy_version"] == module.updates_done
                rows = newest & mask_of(rollout)
                with torch.no_grad():
                    found = module.algorithms[policy_id].policy.evaluate(rollout)[0][rows]
                probabilities.append((found, rollout["action_log_prob"][rows]))

    fit(algorithm, data(num_env_runners=2, prefetch=prefetch, max_env_steps=640), callbacks=[Check()])
    assert sum(len(found) for found, _ in probabilities) > (0 if prefetch else 500)
    for found, expected in probabilities:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- what is not finite -----------------------------------------------------------------------------------------------


class SpoiledPPO(PPO):
    """Its loss is not finite at some steps."""

    num_losses, spoiled = 0, range(0)

    def loss(self, minibatch: TensorDict) -> tuple[Tensor, Tensor]:
        loss, terms = super().loss(minibatch)
        self.num_losses += 1
        return loss * (float("nan") if self.num_losses - 1 in self.spoiled else 1.0), terms


def spoiled(policy_id: str, steps: range) -> MultiAgent:
    algorithm = pair(SpoiledPPO, **SMALL)
    algorithm.algorithms[policy_id].spoiled = steps
    return algorithm


def test_a_step_that_is_skipped_is_skipped_once_for_all(tmp_path: Path) -> None:
    algorithm = spoiled("b", range(1, 2))
    with pytest.warns(UserWarning, match="The loss is not finite after 0 env steps: the optimizer step was"):
        trainer = fit(algorithm, default_root_dir=tmp_path)
    metrics = metrics_of(trainer)
    assert trainer.global_step == 12 - 1 and algorithm.skipped_updates == 1
    assert metrics["a/optim/skipped_updates"] == metrics["b/optim/skipped_updates"] == 1
    assert metrics["a/optim/grad_norm"] == metrics["b/optim/grad_norm"] > 0
    (path,) = tmp_path.rglob("nonfinite_batch_*")
    assert set(torch.load(path)) == {"a", "b"}
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = pair(SpoiledPPO, **SMALL)
    fit(again, data(max_env_steps=192), tmp_path / "x.ckpt")
    assert again.skipped_updates == 1


def test_steps_whose_outcome_the_device_alone_knows_train_as_others_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for deferred in (False, True):
        if deferred:
            monkeypatch.setattr(gradient_steps, "DEFERRED_ON", ("cpu",))
        algorithm = spoiled("b", range(1, 2))
        with pytest.warns(UserWarning, match="The loss is not finite"):
            fit(algorithm, default_root_dir=tmp_path)
        assert algorithm.skipped_updates == 1
        found.append(dict(algorithm.state_dict()))
    assert_same(*found)


def test_steps_that_are_skipped_one_after_another_end_the_run(tmp_path: Path) -> None:
    # "a" takes four steps in each update.
    with pytest.raises(DivergedError, match="The loss is not finite after 32 env steps, 8 times in a"), pytest.warns():
        fit(spoiled("a", range(100)), data(rollout_length=8), default_root_dir=tmp_path)
    assert list(tmp_path.rglob("before_divergence.ckpt"))


def test_a_gradient_that_is_not_finite_is_named_with_its_policy(tmp_path: Path) -> None:
    class Infinite(PPO):
        def loss(self, minibatch: TensorDict) -> tuple[Tensor, Tensor]:
            loss, terms = super().loss(minibatch)
            return loss + ((0.0 * self.policy.head.bias[0]).sqrt() if self.hp.lr == 2e-4 else 0.0), terms

    options = SMALL | {"minibatch_size": 16}
    algorithm = MultiAgent({"a": Infinite(**options), "b": Infinite(lr=2e-4, **options)}, encoder_groups=PAIR)
    with pytest.warns(UserWarning, match=r"The gradient of b\.policy\.head\.bias is not finite"):
        fit(algorithm, data(max_env_steps=16, rollout_length=4), default_root_dir=tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["PPO, both", "PPO, LSTM", "PPO, LSTM, critic by itself", "IMPALA, both", "APPO, GRU"])
def test_a_checkpoint_is_loaded_with_what_is_shared_and_resumed_exactly(case: str, tmp_path: Path) -> None:
    cls, shared, options = CASES[case]
    make = functools.partial(pair, cls.__mro__[2], shared, **options)
    unbroken, broken, resumed = make(), make(), make()
    fit(unbroken)
    trainer = fit(broken, data(max_env_steps=64))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert_same(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    assert not torch.equal(next(resumed.parameters()), next(broken.parameters()))

    weights = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    names = [name for name in weights if name.startswith("algorithms.a.policy.encoder.")]
    assert names  # what is shared is there once
    assert all(weights[name].data_ptr() == weights[name.replace(".a.", ".b.")].data_ptr() for name in names)

    loaded = MultiAgent.load_from_checkpoint(tmp_path / "half.ckpt")
    a, b = loaded.algorithms.values()
    assert a.policy.encoder is b.policy.encoder and a.critic is b.critic
    assert_same(dict(loaded.state_dict()), dict(broken.state_dict()))
    policies = load_policy(tmp_path / "half.ckpt")
    obs = np.eye(3, dtype=np.float32)[1]
    for policy_id, algorithm in broken.algorithms.items():
        expected = algorithm.policy.act(obs)
        alone = load_policy(tmp_path / "half.ckpt", policy=policy_id)
        for policy in (alone, policies.learned[policy_id]):
            assert_same(list(policy.act(obs)[:1]), list(expected[:1]))
            assert_same(dict(policy.state_dict()), dict(algorithm.policy.state_dict()))


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    trainer = fit(pair(shared="critic", **SMALL))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for other, sentence in (
        (pair(**SMALL), r"encoder_groups=\[\['a', 'b'\]\]: the checkpoint has \[\]\. Resume with the same"),
        (
            MultiAgent({"a": PPO(**SMALL), "b": PPO(**SMALL)}),
            r"critic_groups=\[\]: the checkpoint has \[\['a', 'b'\]\]",
        ),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            fit(other, data(max_env_steps=256), tmp_path / "a.ckpt")
    trainer = fit(MultiAgent({"a": PPO(**SMALL), "b": PPO(**SMALL)}))
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"critic_groups=\[\['a', 'b'\]\]: the checkpoint has \[\]"):
        fit(pair(shared="critic", **SMALL), data(max_env_steps=256), tmp_path / "b.ckpt")


def test_policies_that_share_a_network_begin_from_files_with_one(tmp_path: Path) -> None:
    trainer = fit(MultiAgent({"a": PPO(**SMALL), "b": PPO(**SMALL)}))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    team = pair(**SMALL)
    fit(team).save_checkpoint(tmp_path / "one.ckpt")

    def begun(path: Path, *policy_ids: str) -> Any:
        paths = {policy_id: str(path) for policy_id in policy_ids}
        algorithm = MultiAgent({"a": PPO(**SMALL), "b": PPO(**SMALL)}, init_from=paths, **SHARED["both"])
        quiet_trainer(max_epochs=0).fit(algorithm, data())
        return algorithm.algorithms

    for policy_id, algorithm in begun(tmp_path / "one.ckpt", "b", "a").items():
        assert_same(dict(algorithm.policy.state_dict()), dict(team.algorithms[policy_id].policy.state_dict()))
    for policy_id in ("a", "b"):  # the shared encoder is that of the file, be it of the first policy or not
        algorithms = begun(tmp_path / "two.ckpt", policy_id)
        expected = load_policy(tmp_path / "two.ckpt", policy=policy_id).state_dict()
        assert_same(dict(algorithms[policy_id].policy.state_dict()), dict(expected))
        assert algorithms["a"].policy.encoder is algorithms["b"].policy.encoder
    with pytest.raises(
        CheckpointError, match="init_from: 'b' and 'a' share the critic, of which their checkpoints hold"
    ):
        begun(tmp_path / "two.ckpt", "b", "a")


# --- bad input --------------------------------------------------------------------------------------------------------


class OwnUpdate(PPO):
    def update(self, rollout: TensorDict) -> dict[str, Any]:
        return super().update(rollout)


class OwnOptimizers(PPO):
    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers()]


def three(first: Algorithm, second: Algorithm, **options: Any) -> MultiAgent:
    return MultiAgent({"a": first, "b": second, "c": Random()}, **options)


@pytest.mark.parametrize("option", ["critic_groups", "encoder_groups"])
@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ("ab", "='ab': expected a list of groups, such as"),
        (["a", "b"], r"=\['a', 'b'\]: expected a list of groups, such as"),
        ([["a", "d"]], r": 'd': expected policies whose algorithms are trained, of \['a', 'b'\]"),
        ([["a", "c"]], ": 'c': expected policies whose algorithms are trained"),
        ([["a"]], r": the group \['a'\]: expected at least two policies"),
        ([["a", "b", "a"]], r": the group \['a', 'b', 'a'\]: expected at least two policies, each of them once"),
        ([["a", "a"]], r": the group \['a', 'a'\]: expected at least two policies"),
        ([["a", "b"], ["b", "a"]], ": 'a' is in two groups. Join them"),
    ],
)
def test_groups_that_cannot_be_are_refused(option: str, groups: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=option + sentence):
        three(PPO(), PPO(), **{option: groups})


@pytest.mark.parametrize("option", ["critic_groups", "encoder_groups"])
@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (PPO(), DQN(), "'b' learns by DQN: expected an on-policy actor-critic, PPO, IMPALA or APPO"),
        (PPO(), IMPALA(), "'a' learns by PPO and 'b' by IMPALA: expected one algorithm"),
        (IMPALA(), APPO(), "'a' learns by IMPALA and 'b' by APPO: expected one algorithm"),
        (PPO(), PPO(compile=True), "'b' has compile=True: expected eager steps"),
        (PPO(), PPO(max_grad_norm=1.0), "max_grad_norm=0.5 of 'a' and 1.0 of 'b': expected one value for both"),
        (PPO(), PPO(grad_clip_by="norm"), "grad_clip_by='global_norm' of 'a' and 'norm' of 'b'"),
        (PPO(), PPO(adam_eps=1e-8), "adam_eps=1e-05 of 'a' and 1e-08 of 'b'"),
        (IMPALA(), IMPALA(optimizer="rmsprop"), "optimizer='adam' of 'a' and 'rmsprop' of 'b'"),
        (IMPALA(), IMPALA(rmsprop_eps=0.2), "rmsprop_eps=0.1 of 'a' and 0.2 of 'b'"),
        (APPO(), APPO(rmsprop_decay=0.2), "rmsprop_decay=0.99 of 'a' and 0.2 of 'b'"),
        (OwnUpdate(), OwnUpdate(), "OwnUpdate, the algorithm of 'a', overrides update, which is not called"),
    ],
)  # fmt: skip
def test_algorithms_that_cannot_learn_together_are_refused(
    option: str, first: Algorithm, second: Algorithm, sentence: str
) -> None:
    with pytest.raises(OptionError, match=f"{option}: {sentence}"):
        three(first, second, **{option: PAIR})


def test_policies_that_are_not_trained_cannot_share() -> None:
    with pytest.raises(OptionError, match="'b': expected policies whose algorithms are trained"):
        three(PPO(), PPO(), train=["a"], critic_groups=PAIR)


SMALLER = functools.partial(MLP, hidden_sizes=[8])
RELU = functools.partial(MLP, activation="relu")


@pytest.mark.parametrize(
    ("first", "second", "options", "sentence"),
    [
        ({}, {"network": SMALLER}, "encoder", "encoder_groups: 'a' and 'b' have different networks. Give both"),
        ({}, {"network": RELU}, "encoder", "encoder_groups: 'a' and 'b' have different networks. Give both"),
        ({}, {"network": SMALLER}, "critic", "critic_groups: 'a' and 'b' have different networks. Give both"),
        ({}, {"normalize_observations": True}, "encoder", r"different normalize_observations \(False and True\)"),
        ({}, {"normalize_observations": True}, "critic", r"different normalize_observations \(False and True\)"),
        ({}, {"share_encoder": True}, "critic", "critic_groups: 'a' and 'b' have different kinds of critic"),
        ({}, {"central_critic": "observations"}, "critic", "different kinds of critic"),
        ({}, {"normalize_values": True}, "critic", "'a' and 'b' have different normalize_values"),
        ({}, {"share_encoder": True}, "both", "critic_groups: 'a' and 'b' have different kinds of critic"),
        ({}, {"gamma": 0.9}, "critic", r"critic_groups: 'a' and 'b' have different gamma \(0.99 and 0.9\)"),
        ({}, {"normalize_returns": False}, "critic", r"different normalize_returns \(True and False\)"),
        ({"share_encoder": True}, {"share_encoder": True}, "critic", r"Share the encoders too: encoder_groups=\[\['a"),
        ({"network": LSTM}, {"network": LSTM}, "critic", "the critics of 'a' and 'b' are heads on their policies'"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_one_are_refused(first: Any, second: Any, options: str, sentence: str) -> None:
    algorithm = MultiAgent({"a": PPO(**SMALL | first), "b": PPO(**SMALL | second)}, **SHARED[options])
    with pytest.raises(OptionError, match=sentence):
        fit(algorithm)


@pytest.mark.parametrize("shared", ["encoder", "critic"])
def test_policies_of_other_observations_cannot_share(shared: str) -> None:
    with pytest.raises(OptionError, match="'a' and 'b' have different observation spaces"):
        fit(pair(shared=shared, **SMALL), data(functools.partial(Namers, scale=2.0)))


def test_several_optimizers_of_one_algorithm_are_refused() -> None:
    with pytest.raises(OptionError, match=r"policies\['a'\] shares a network: expected configure_optimizers of OwnOpt"):
        fit(pair(OwnOptimizers, **SMALL))
