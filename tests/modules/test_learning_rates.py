"""Which learning rate each of SAC's parameters has, and Adam's epsilon."""

import functools

import pytest

from lit_rl import DQN, MLP, PPO, SAC, TQC, LSTMNetwork, Rainbow
from lit_rl.envs.make import EnvConfig

SMALL = functools.partial(MLP, hidden_sizes=[8])
MEMORY = functools.partial(LSTMNetwork, hidden_size=8)
RATES = {"lr": 1e-4, "actor_lr": 1e-5, "critic_lr": 1e-3, "alpha_lr": 1e-2}


def rates(make, **options) -> dict[str, float]:
    algorithm = make(spec=EnvConfig("Pendulum-v1").spec().to_dict(), **options)
    algorithm.build(algorithm.spec)
    names = {parameter: name for name, parameter in algorithm.named_parameters()}
    groups = algorithm.configure_optimizers().param_groups
    return {names[p]: options["lr"] * group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("make", [SAC, TQC])
@pytest.mark.parametrize(
    ("options", "encoder"),
    [
        ({"network": SMALL, "share_encoder": True}, 1e-3),
        ({"network": MEMORY}, 1e-3),
        ({"network": SMALL}, 1e-5),
        ({"network": SMALL, "share_encoder": True, "critic_lr": None}, 1e-4),
    ],
)
def test_the_encoder_that_the_critics_train_has_their_learning_rate(make, options, encoder) -> None:
    options = RATES | options
    found = rates(make, **options)
    for name, lr in found.items():
        if name.startswith("policy.encoder."):
            expected = encoder
        elif name.startswith("policy."):
            expected = 1e-5
        else:
            expected = 1e-2 if name == "log_alpha" else options["critic_lr"] or 1e-4
        assert lr == pytest.approx(expected), name
    assert any(name.startswith("policy.encoder.") for name in found)
    assert next(iter(found)).startswith("policy.")  # the first group's learning rate is logged


def test_one_learning_rate_is_one_group_in_the_order_of_the_parameters() -> None:
    found = list(rates(SAC, lr=1e-3, share_encoder=True))  # which optimizer states in checkpoints rely on
    algorithm = SAC(spec=EnvConfig("Pendulum-v1").spec().to_dict(), share_encoder=True)
    algorithm.build(algorithm.spec)
    parts = {"policy": algorithm.policy, "critics": algorithm.critics}
    names = [f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_parameters()]
    assert found == [*names, "log_alpha"]


@pytest.mark.parametrize(("make", "default"), [(PPO, 1e-5), (DQN, 1e-8), (Rainbow, 1e-8), (SAC, 1e-8), (TQC, 1e-8)])
def test_adams_epsilon_is_an_option(make, default) -> None:
    for options, expected in (({}, default), ({"adam_eps": 1.5e-4}, 1.5e-4)):
        env = "CartPole-v1" if make in (DQN, Rainbow) else "Pendulum-v1"
        algorithm = make(spec=EnvConfig(env).spec().to_dict(), **options)
        algorithm.build(algorithm.spec)
        assert {group["eps"] for group in algorithm.configure_optimizers().param_groups} == {expected}
