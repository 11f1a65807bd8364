"""What was learned from recorded data goes on online: which parts are taken, which are refused, and in which words."""

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import quiet_trainer
from recorded import learn, one_update
from tensordict import TensorDict

from lit_rl import BC, CQL, DQN, IQL, MARWIL, MLP, PPO, SAC, DiscreteCQL, Evaluation, ReplayDataModule
from lit_rl.algorithm import Algorithm
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.loading import load_policy
from lit_rl.spec import EnvSpec

OBS = spaces.Box(-1, 1, (3,), np.float32)
BOX = EnvSpec("Test", OBS, spaces.Box(-2, 4, (2,), np.float32)).to_dict()
DISCRETE = EnvSpec("Test", OBS, spaces.Discrete(3)).to_dict()
SMALL = functools.partial(MLP, hidden_sizes=[16])


def rows(spec: dict, num: int = 64) -> TensorDict:
    g = torch.Generator().manual_seed(0)
    action = torch.rand(num, 2, generator=g) * 2 - 1 if spec is BOX else torch.randint(3, (num,), generator=g)
    obs, reward = torch.randn(num, 3, generator=g), torch.randn(num, generator=g)
    return TensorDict(
        {
            "observation": obs, "action": action, "discount": torch.full((num,), 0.99), "return_to_go": reward,
            "to_go_discount": torch.zeros(num), "to_go_observation": obs,
            "next": {"observation": obs, "reward": reward, "terminated": torch.zeros(num, dtype=torch.bool)},
        },
        [num],
    )  # fmt: skip


def trained(kind: type[Algorithm], spec: dict, folder: Path, **options: Any) -> tuple[str, Any]:
    """A checkpoint of an offline run, and the algorithm that wrote it."""
    algorithm = kind(spec=spec, network=SMALL, **options)
    path = folder / f"{kind.__name__}.ckpt"
    learn(algorithm, rows(spec), 3).save_checkpoint(path)
    return str(path), algorithm


def begun(kind: type[Algorithm], spec: dict, path: str, **options: Any) -> Any:
    algorithm = kind(spec=spec, **{"network": SMALL} | options)
    algorithm.init_from = path
    algorithm.configure_model()
    return algorithm


@pytest.mark.parametrize(
    ("offline", "online", "spec", "taken"),
    [
        (BC, PPO, BOX, ["policy"]),
        (BC, PPO, DISCRETE, ["policy"]),
        (MARWIL, PPO, BOX, ["policy"]),
        (CQL, SAC, BOX, ["policy", "critics", "target", "log_alpha"]),
        (IQL, SAC, BOX, ["policy", "critics", "target"]),
        (IQL, SAC, DISCRETE, ["policy", "critics", "target"]),
        (DiscreteCQL, DQN, DISCRETE, ["policy", "target"]),
    ],
)
def test_an_online_run_begins_with_what_was_learned_offline(
    tmp_path: Path, offline: type, online: type, spec: dict, taken: list[str]
) -> None:
    path, source = trained(offline, spec, tmp_path)
    algorithm, weights = begun(online, spec, path), source.state_dict()
    found = algorithm.state_dict()
    for part in taken:
        names = [name for name in found if name.split(".")[0] == part]
        assert names
        for name in names:
            assert torch.equal(found[name], weights[name]), name
    assert algorithm.env_steps_done == algorithm.updates_done == 0
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.testing.assert_array_equal(algorithm.policy.act(obs)[0], load_policy(path).act(obs)[0])


@pytest.mark.parametrize("normalize", [True, False])
def test_a_critic_of_plain_returns_gives_no_last_layer_to_one_of_scaled_rewards(
    tmp_path: Path, normalize: bool
) -> None:
    path, source = trained(MARWIL, BOX, tmp_path, normalize_values=normalize)
    scaled, plain = (begun(PPO, BOX, path, normalize_returns=x).state_dict() for x in (True, False))
    weights = source.state_dict()
    for name in ("critic.encoder.layers.0.weight", "critic.head.linear.weight"):
        name = next(found for found in weights if found.startswith(name.rsplit(".", 2)[0]) and found.endswith("weight"))
        is_last = "linear" in name
        assert torch.equal(scaled[name], weights[name]) != is_last
        assert torch.equal(plain[name], weights[name]) == (not is_last or not normalize)


def test_what_the_offline_run_does_not_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = trained(IQL, BOX, tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        algorithm = begun(SAC, BOX, path, initial_alpha=0.1)
    (said,) = [record.getMessage() for record in caplog.records if "not taken" in record.getMessage()]
    assert "log_alpha" in said and "state_value" in said and "critics" not in said
    assert algorithm.log_alpha.exp().item() == pytest.approx(0.1)


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_sac_goes_on_with_the_temperature_of_the_offline_run(tmp_path: Path, learn_alpha: bool) -> None:
    path, source = trained(CQL, BOX, tmp_path, initial_alpha=0.3)
    algorithm = begun(SAC, BOX, path, initial_alpha=1.0, learn_alpha=learn_alpha)
    assert algorithm.log_alpha.item() == source.log_alpha.item() != 0.0


@pytest.mark.parametrize(
    ("offline", "options", "online", "more", "spec", "message"),
    [
        (
            BC,
            {"squash_actions": True},
            PPO,
            {},
            BOX,
            "made with squash_actions=True, this one with squash_actions=False",
        ),
        (BC, {}, PPO, {"state_dependent_std": True}, BOX, "made with state_dependent_std=False, this one with"),
        (BC, {"normalize_observations": True}, PPO, {}, BOX, "normalize_observations=True"),
        (BC, {}, SAC, {}, BOX, "SAC has no other policy, so that the other run must be with squash_actions=True"),
        (BC, {}, DQN, {}, DISCRETE, "written with policy_class=Policy, not QPolicy: DQN learns a QPolicy alone"),
        (DiscreteCQL, {}, PPO, {}, DISCRETE, "written with policy_class=QPolicy, not Policy"),
        (DiscreteCQL, {"dueling": True}, DQN, {}, DISCRETE, "made with dueling=True, this one with dueling=False"),
        (BC, {}, PPO, {"network": None}, BOX, "the policy differs"),
    ],
)
def test_another_policy_is_refused_by_the_name_of_the_option(
    tmp_path: Path, offline: type, options: dict, online: type, more: dict, spec: dict, message: str
) -> None:
    path, _ = trained(offline, spec, tmp_path, **options)
    with pytest.raises(CheckpointError) as error:
        begun(online, spec, path, **more)
    assert message in str(error.value)


def test_imitation_with_sacs_policy_is_gone_on_with_by_sac(tmp_path: Path) -> None:
    path, source = trained(BC, BOX, tmp_path, squash_actions=True, state_dependent_std=True)
    algorithm = begun(SAC, BOX, path)
    for name, weight in source.policy.state_dict().items():
        assert torch.equal(algorithm.policy.state_dict()[name], weight)


# --- critics first --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BOX, DISCRETE])
def test_the_critics_learn_alone_at_first(spec: dict) -> None:
    algorithm = SAC(spec=spec, network=SMALL, critic_warmup=5)
    algorithm.configure_model()
    before = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
    learn(algorithm, rows(spec), 5)
    after = algorithm.state_dict()
    for name, tensor in before.items():
        moved = name.startswith(("critics", "target")) or name == "updates"
        assert torch.equal(after[name], tensor) != moved, name
    _, gradients = one_update(algorithm, rows(spec))  # the sixth
    assert algorithm.updates_done == 5
    assert gradients["policy.head.weight"].abs().sum() > 0 and gradients["log_alpha"] != 0


def test_the_policys_first_step_is_as_long_as_ever_after_that() -> None:
    """Adam has not seen gradients of zero meanwhile, after which its first steps would be several times as long."""
    algorithm = SAC(spec=BOX, network=SMALL, critic_warmup=20, lr=1e-3)
    algorithm.configure_model()
    before = algorithm.policy.head.weight.detach().clone()
    learn(algorithm, rows(BOX), 21)
    step = (algorithm.policy.head.weight - before).abs().max().item()
    assert step == pytest.approx(1e-3, rel=1e-2)


def test_critics_first_is_for_steps_that_are_not_compiled() -> None:
    with pytest.raises(OptionError, match="critic_warmup=3: expected 0 with compile=True"):
        SAC(critic_warmup=3, compile=True)


@pytest.mark.slow
def test_a_run_goes_on_online_by_the_datamodule(tmp_path: Path) -> None:
    spec = EnvSpec.from_dict(BOX)
    assert spec is not None
    data = ReplayDataModule(
        "Pendulum-v1", max_env_steps=60, learning_starts=20, batch_size=16, buffer_size=500, env_steps_per_batch=30,
        evaluation=Evaluation(episodes=1), seed=0,
    )  # fmt: skip
    offline = IQL(network=SMALL)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(offline, data)
    trainer.save_checkpoint(tmp_path / "iql.ckpt")
    online = SAC(network=SMALL, critic_warmup=10)
    online.init_from = str(tmp_path / "iql.ckpt")
    quiet_trainer(limit_val_batches=0).fit(online, data)
    assert online.updates_done > 10 and not torch.equal(online.policy.head.weight, offline.policy.head.weight)
