"""The learner on a device, env runners on the CPU. On a GPU where there is one; the same tests run on the CPU too."""

import copy
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from envs import PictureEnv
from helpers import assert_same, run_python
from tensordict import TensorDict

from lit_rl import (
    APPO,
    DQN,
    IMPALA,
    PPO,
    SAC,
    Evaluation,
    LSTMNetwork,
    MultiAgent,
    Rainbow,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.learner.transfer import Transfer
from lit_rl.replay.feed import ReplayFeed
from lit_rl.rollout import Rollout

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it before the first use

GPU = pytest.param(
    "gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
on_devices = pytest.mark.parametrize("accelerator", ["cpu", GPU])
# On the CPU test_compiled.py compiles.
in_each_form = pytest.mark.parametrize(
    ("accelerator", "compile"),
    [
        pytest.param("cpu", False, id="cpu-eager"),
        pytest.param("gpu", False, marks=GPU.marks, id="gpu-eager"),
        pytest.param("gpu", True, marks=GPU.marks, id="gpu-compiled"),
    ],
)
ROLLOUTS: dict[str, Any] = {"rollout_length": 16, "max_env_steps": 512, "seed": 0, "evaluation": Evaluation(episodes=2)}
REPLAY: dict[str, Any] = {
    "buffer_size": 500, "batch_size": 32, "learning_starts": 64, "update_to_data": 0.25, "env_steps_per_batch": 100,
    "max_env_steps": 300, "seed": 0, "evaluation": Evaluation(episodes=2),
}  # fmt: skip
CASES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "PPO": lambda **options: (
        PPO(minibatch_size=32, normalize_observations=True, normalize_returns=True, **options),
        RolloutDataModule("CartPole-v1", **ROLLOUTS),
    ),
    "PPO with memory": lambda: (
        PPO(minibatch_size=32, network=LSTMNetwork),
        RolloutDataModule("CartPole-v1", **ROLLOUTS),
    ),
    "PPO on pictures": lambda: (
        PPO(minibatch_size=32),
        RolloutDataModule(PictureEnv, env_kwargs={"size": 36}, **ROLLOUTS),
    ),
    "IMPALA": lambda **options: (
        IMPALA(optimizer="rmsprop", normalize_observations=True, normalize_returns=True, **options),
        RolloutDataModule("CartPole-v1", **ROLLOUTS),
    ),
    "IMPALA with memory": lambda: (
        IMPALA(network=LSTMNetwork, burn_in=4),
        RolloutDataModule("CartPole-v1", **ROLLOUTS),
    ),
    "APPO": lambda **options: (
        APPO(kl_coef=0.2, target_update_interval=1, normalize_observations=True, **options),
        RolloutDataModule("CartPole-v1", **ROLLOUTS),
    ),
    "APPO, squashed": lambda: (APPO(squash_actions=True), RolloutDataModule("Pendulum-v1", **ROLLOUTS)),
    "DQN": lambda **options: (DQN(**options), ReplayDataModule("CartPole-v1", **REPLAY)),
    "Rainbow": lambda: (Rainbow(), ReplayDataModule("CartPole-v1", **REPLAY)),
    "DQN with memory": lambda: (
        DQN(network=LSTMNetwork, sequence_length=8, burn_in=4),
        ReplayDataModule("CartPole-v1", **REPLAY),
    ),
    "SAC": lambda **options: (SAC(**options), ReplayDataModule("Pendulum-v1", **REPLAY)),
}
COMPILED = ["PPO", "IMPALA", "APPO", "DQN", "SAC"]
ON_POLICY = ("PPO", "IMPALA", "APPO")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Turns off what a Trainer with `deterministic=True` turned on."""
    yield
    torch.use_deterministic_algorithms(False)


def numbers(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


def fit(trainer: L.Trainer, name: str, path: str | None = None, env_steps: int | None = None, **options: Any) -> Any:
    """A trained algorithm of `CASES`, and its datamodule."""
    module, data = CASES[name](**options)
    data.max_env_steps = env_steps or data.max_env_steps
    trainer.fit(module, data, ckpt_path=path)
    return module, data


@on_devices
@pytest.mark.parametrize("name", list(CASES))
def test_the_learner_works_there_and_its_policy_on_the_cpu(name: str, accelerator: str, make_trainer: Callable) -> None:
    trainer, found = make_trainer(accelerator=accelerator), set()
    module, data = CASES[name]()
    update, data.max_env_steps = module.update, 256

    def watched(batch: TensorDict) -> Any:
        found.update(leaf.device.type for leaf in batch.values(include_nested=True, leaves_only=True))
        return update(batch)

    module.update = watched
    trainer.fit(module, data)
    assert found == {"cuda" if accelerator == "gpu" else "cpu"}  # what is learned from
    assert module.env_steps_done > 250 and trainer.callback_metrics["eval/episodes"] == 2
    assert all(torch.isfinite(value).all() for value in numbers(module).values() if value.is_floating_point())
    trainer.save_checkpoint("there.ckpt")
    policy = load_policy("there.ckpt")
    assert all(parameter.device.type == "cpu" for parameter in policy.parameters())
    again, _ = fit(make_trainer(accelerator=accelerator), name, "there.ckpt", 2 * module.env_steps_done)
    assert again.env_steps_done > module.env_steps_done


@in_each_form
@pytest.mark.parametrize("name", COMPILED)
def test_a_few_updates_give_the_weights_of_eager_ones_on_the_cpu(
    name: str, compile: bool, accelerator: str, make_trainer: Callable
) -> None:
    env_steps = 256 if name in ON_POLICY else 64 + 40
    expected, _ = fit(make_trainer(), name, env_steps=env_steps)
    found, _ = fit(make_trainer(accelerator=accelerator), name, env_steps=env_steps, compile=compile)
    assert found.updates_done == expected.updates_done > 1
    for path, value in numbers(expected).items():
        torch.testing.assert_close(numbers(found)[path], value, rtol=1e-3, atol=2e-4, msg=path)


@on_devices
@pytest.mark.parametrize("cls", [PPO, APPO])
def test_policies_that_share_networks_learn_there_as_on_the_cpu(
    cls: type, accelerator: str, make_trainer: Callable
) -> None:
    env_kwargs, groups = {"env": "CartPole-v1", "num_agents": 2}, [["agent_0", "agent_1"]]
    found = []
    for where in ("cpu", accelerator):
        options: dict[str, Any] = {"minibatch_size": 32, "num_epochs": 2} if cls is PPO else {}
        policies = {policy_id: cls(normalize_observations=True, **options) for policy_id in groups[0]}
        module = MultiAgent(policies, critic_groups=groups, encoder_groups=groups)
        sizes = ROLLOUTS | {"max_env_steps": 256}
        data = RolloutDataModule("lit_rl.envs.multi_agent:ReplicatedEnv", env_kwargs=env_kwargs, **sizes)
        make_trainer(accelerator=where).fit(module, data)
        found.append(numbers(module))
    for path, value in found[0].items():
        torch.testing.assert_close(found[1][path], value, rtol=1e-3, atol=2e-4, msg=path)


class Follows(L.Callback):
    """The env runner's policy is on the CPU, and has the learner's weights whenever it is given them."""

    seen = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        data = trainer.datamodule
        if isinstance(data, ReplayDataModule):  # a batch begins before its env steps are taken
            data.start_runners()
        acting = data._pool._runner.policy.state_dict()
        assert {value.device.type for value in acting.values()} == {"cpu"}
        assert_same(acting, {name: value.cpu() for name, value in module.policy.state_dict().items()})
        self.seen += 1


@in_each_form
@pytest.mark.parametrize("name", COMPILED)
def test_the_policy_that_acts_stays_on_the_cpu_and_follows(
    name: str, compile: bool, accelerator: str, make_trainer: Callable
) -> None:
    follows = Follows()
    module, _ = fit(make_trainer(accelerator=accelerator, callbacks=[follows]), name, compile=compile)
    assert follows.seen > 2
    obs = np.zeros((1, *module.spec.observation_space.shape), np.float32)
    module.cpu()
    expected = module.policy(torch.from_numpy(obs)).detach().numpy()
    np.testing.assert_allclose(module.policy.acting_copy().parameters_of(obs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@on_devices
def test_checkpoints_from_there_act_and_go_on_where_there_is_no_gpu(accelerator: str, make_trainer: Callable) -> None:
    expected, paths = [], []
    for name in ("PPO", "DQN with memory", "SAC"):
        module, data = fit(trainer := make_trainer(accelerator=accelerator), name)
        trainer.save_checkpoint(path := f"{name}.ckpt")
        again, _ = fit(make_trainer(), name, path, 2 * data.max_env_steps)
        assert again.env_steps_done > module.env_steps_done
        policy = module.cpu().policy.acting_copy()
        expected.append(policy.act(np.zeros(policy.spec.observation_space.shape, np.float32))[0].tolist())
        paths.append(path)
    code = f"""
import numpy as np, torch
from lit_rl import load_policy
assert not torch.cuda.is_available()
policies = [load_policy(path) for path in {paths}]
print([policy.act(np.zeros(policy.spec.observation_space.shape, np.float32))[0].tolist() for policy in policies])
"""
    acted = run_python("-c", code, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout
    assert acted.splitlines()[-1] == str(expected)


@on_devices
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_equals_an_unbroken_one_there(name: str, accelerator: str, make_trainer: Callable) -> None:
    def trainer() -> L.Trainer:
        return make_trainer(accelerator=accelerator, deterministic=True, limit_val_batches=0)

    env_steps = 256 if name in ON_POLICY else 160
    whole, _ = fit(last := trainer(), name, env_steps=2 * env_steps)
    half, _ = fit(first := trainer(), name, env_steps=env_steps)
    first.save_checkpoint("half.ckpt")
    resumed, _ = fit(second := trainer(), name, "half.ckpt", 2 * env_steps)
    assert resumed.updates_done == whole.updates_done > half.updates_done > 0
    assert_same(numbers(resumed), numbers(whole))
    assert_same(*(each.optimizers[0].state_dict()["state"] for each in (second, last)))


class Moved(L.Callback):
    """How far training moved the weights, in one row."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin = self._weights(module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.by = self._weights(module) - self._begin

    def _weights(self, module: L.LightningModule) -> torch.Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in module.parameters() if p.requires_grad])


@on_devices
@pytest.mark.parametrize("name", ["PPO", "PPO on pictures", "IMPALA", "APPO", "DQN", "SAC"])
def test_mixed_precision_goes_where_float32_goes_there(name: str, accelerator: str, make_trainer: Callable) -> None:
    moved = []
    for precision in ("32-true", "bf16-mixed"):
        moved.append(Moved())
        trainer = make_trainer(accelerator=accelerator, precision=precision, limit_val_batches=0, callbacks=[moved[-1]])
        fit(trainer, name, env_steps=128 if name.startswith(ON_POLICY) else 112)
        assert trainer.callback_metrics["optim/skipped_updates"] == 0
    assert torch.cosine_similarity(moved[0].by, moved[1].by, dim=0) > 0.8


@on_devices
def test_priorities_come_back_from_there(
    accelerator: str, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = Rainbow(), ReplayDataModule("CartPole-v1", **REPLAY)
    draw, last = ReplayFeed.draw, []

    def watched(feed: ReplayFeed) -> TensorDict:
        last[:] = [draw(feed)]
        return last[0]

    monkeypatch.setattr(ReplayFeed, "draw", watched)
    make_trainer(accelerator=accelerator, limit_val_batches=0).fit(module, data)
    minibatch, tree = last[0], data.buffer._tree
    index, priority = minibatch["index"].cpu().numpy(), minibatch["priority"].double().cpu().numpy()
    where = np.unique(index[::-1], return_index=True)  # of a row that was drawn twice the last priority counts
    expected = (np.abs(priority[::-1][where[1]]) + 1e-6) ** data.buffer._alpha
    np.testing.assert_allclose(tree.leaves[where[0]], expected)
    assert len(set(expected)) > 10


@in_each_form
@pytest.mark.parametrize("name", COMPILED)
def test_a_gradient_that_is_not_finite_changes_nothing_there(
    name: str, compile: bool, accelerator: str, make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = CASES[name](compile=compile)
    step, changed = module.gradient_step, []

    def spoiled(batch: TensorDict) -> Any:
        if len(changed) == 2:
            batch["observation"] = torch.full_like(batch["observation"], torch.nan)
        before = copy.deepcopy([*module.policy.parameters()])
        taken, rest = step(batch)
        changed.append(taken)
        assert taken != all(map(torch.equal, before, module.policy.parameters()))
        return taken, rest

    monkeypatch.setattr(module, "gradient_step", spoiled)
    trainer = make_trainer(accelerator=accelerator, limit_val_batches=0)
    with pytest.warns(UserWarning, match="the optimizer step was skipped"):
        trainer.fit(module, data)
    assert changed.count(False) == 1 and not changed[2]
    assert trainer.callback_metrics["optim/skipped_updates"] == 1 and trainer.global_step == len(changed) - 1


@pytest.mark.gpu
@pytest.mark.ray
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
@pytest.mark.usefixtures("ray_session")
def test_env_runners_stay_on_the_cpu(make_trainer: Callable) -> None:
    data = RolloutDataModule("CartPole-v1", num_env_runners=1, prefetch=1, rollout_length=16, max_env_steps=512, seed=0)
    module = PPO(minibatch_size=32)
    make_trainer(accelerator="gpu").fit(module, data)
    assert module.env_steps_done == 512 and data.ledger.delivered >= 512


@on_devices
def test_a_batch_arrives_whole(accelerator: str) -> None:
    """Also while the device is at something else, and while batches before it are forgotten."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    transfer, busy = Transfer(), torch.ones(500, 500, device=device)
    for number in range(20):
        sent = Rollout({"x": torch.full((4, 1000), float(number)), "next": {"y": torch.full((4,), number)}}, [4])
        sent["version"] = torch.tensor([[number]]).expand(4, 3)
        sent.env_steps, sent.has_rows = number, False
        busy = busy @ busy / 500
        got = transfer(sent, device)
        assert isinstance(got, Rollout) and (got.env_steps, got.has_rows) == (number, False)
        assert {column.device.type for column in got.values(True, True)} == {device.type}
        assert_same(got.cpu().to_dict(), sent.to_dict())
        assert transfer(got, device) is got or accelerator == "cpu"
