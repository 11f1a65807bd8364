"""Every observation with every network and every action: trains for one update, or is refused in one sentence."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from envs import SampleEnv
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl import (
    BC,
    CQL,
    IQL,
    MLP,
    PPO,
    SAC,
    TQC,
    DiscreteCQL,
    EnvSpec,
    Evaluation,
    GRUNetwork,
    ImpalaResNet,
    LSTMNetwork,
    MultiInput,
    NatureCNN,
    Rainbow,
    Record,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.errors import LitRLError

VECTOR, SMALL, LARGE = (
    spaces.Box(-1, 1, (3,)),
    spaces.Box(0, 255, (8, 8, 3), np.uint8),
    spaces.Box(0, 255, (2, 36, 36), np.uint8),
)
OBSERVATIONS = {
    "number": spaces.Box(-1, 1, ()),
    "vector": VECTOR,
    "whole numbers": spaces.Box(-5, 5, (2,), np.int32),
    "double": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "flags": spaces.Box(0, 1, (2,), np.bool_),
    "matrix": spaces.Box(-1, 1, (3, 4)),
    "bytes": spaces.Box(0, 255, (4,), np.uint8),
    "grey image": spaces.Box(0, 255, (40, 36), np.uint8),
    "small image": SMALL,
    "image": LARGE,
    "float image": spaces.Box(0, 1, (3, 40, 40)),
    "discrete": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([3, 4], start=[1, 0]),
    "multi-binary": spaces.MultiBinary(4),
    "dict": spaces.Dict(a=VECTOR, b=spaces.Discrete(3)),
    "tuple": spaces.Tuple([VECTOR, spaces.MultiBinary(2), spaces.MultiDiscrete([2, 2])]),
    "deep": spaces.Dict(x=spaces.Tuple([spaces.Dict(observation=VECTOR), spaces.Discrete(2)]), image=SMALL),
}
ACTIONS = {
    "discrete": spaces.Discrete(3, start=1),
    "multi-discrete": spaces.MultiDiscrete([2, 3], start=[0, 5]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-2, 1, (2,)),
    "matrix": spaces.Box(-1, 1, (2, 2), np.float64),
    "dict": spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-1, 1, (1,))),
    "tuple": spaces.Tuple(
        [spaces.MultiDiscrete([2, 2]), spaces.Dict(x=spaces.Box(-1, 1, (2,)), y=spaces.MultiBinary(2))]
    ),
}
NETWORKS: dict[str, Any] = {
    "default": None,
    "MLP": functools.partial(MLP, hidden_sizes=(8,), layer_norm=True, embedding_size=2),
    "NatureCNN": functools.partial(NatureCNN, hidden_size=8),
    "ImpalaResNet": functools.partial(ImpalaResNet, filters=(4,), hidden_size=8),
    "MultiInput": functools.partial(MultiInput, hidden_sizes=(8,)),
    "LSTM": functools.partial(LSTMNetwork, hidden_size=8),
    "GRU": functools.partial(GRUNetwork, hidden_size=8),
}
IMAGES = {"grey image", "small image", "image", "float image"}
NESTED = {"dict", "tuple", "deep"}
ALLOWED: dict[str, set[str]] = {
    "default": set(OBSERVATIONS),
    "MLP": set(OBSERVATIONS) - {"deep"},
    "NatureCNN": IMAGES - {"small image"},
    "ImpalaResNet": IMAGES | {"matrix"},
    "MultiInput": NESTED,
    "LSTM": set(OBSERVATIONS),
    "GRU": set(OBSERVATIONS),
}


class Watched(PPO):
    """Notes which parameters had no finite gradient."""

    untrained: list[str]

    def optimize(self, loss: Tensor, optimizer: Any = None) -> bool:
        taken = super().optimize(loss, optimizer)
        grads = {name: p.grad for name, p in self.named_parameters()}
        self.untrained = [n for n, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]
        return taken


def fit(trainer: L.Trainer, observation: str, network: Any, action: str, **options: Any) -> "Watched":
    torch.manual_seed(0)
    data = RolloutDataModule(
        SampleEnv,
        env_kwargs={"observation_space": OBSERVATIONS[observation], "action_space": ACTIONS[action]},
        num_envs_per_env_runner=2,
        rollout_length=16,
        max_env_steps=32,
        evaluation=Evaluation(episodes=2),
        seed=0,
    )
    algorithm = Watched(network=network, minibatch_size=16, num_epochs=1, sequence_length=8, lr=1e-2, **options)
    trainer.fit(algorithm, data)
    return algorithm


def grid(observations: Iterable[str], networks: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """All pairs; slow but for those with the default network, or with a quick observation."""
    found = []
    for observation, network in itertools.product(observations, networks):
        is_quick = network == "default" or observation in quick
        found.append(pytest.param(observation, network, marks=[] if is_quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("observation", "network"), grid(OBSERVATIONS, NETWORKS, quick=["vector", "image", "deep"]))
def test_every_observation_and_network_trains_or_is_refused(
    make_trainer: Callable[..., L.Trainer], observation: str, network: str
) -> None:
    if observation not in ALLOWED[network]:
        with pytest.raises(LitRLError) as error:
            fit(make_trainer(), observation, NETWORKS[network], "discrete")
        message = str(error.value)
        assert "\n" not in message and ("network=" in message or "Use " in message or "use " in message)
        return
    check_trained(make_trainer, observation, NETWORKS[network], "discrete")


@pytest.mark.parametrize(
    ("observation", "network"), grid(["vector", "discrete", "deep"], ["default", "LSTM"], quick=["discrete"])
)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_trained_with_every_kind_of_observation(
    make_trainer: Callable[..., L.Trainer], observation: str, network: str, action: str
) -> None:
    check_trained(make_trainer, observation, NETWORKS[network], action)


def check_trained(make_trainer: Callable[..., L.Trainer], observation: str, network: Any, action: str) -> None:
    """One update changes every parameter; the checkpoint's policy acts as the trained one, inside the action space."""
    trainer = make_trainer()
    algorithm = fit(trainer, observation, network, action)
    assert algorithm.env_steps_done == 32
    assert algorithm.untrained == []
    trainer.save_checkpoint("out.ckpt")
    policy = load_policy("out.ckpt")
    obs = OBSERVATIONS[observation].sample()
    given, state = policy.act(obs)
    expected, _ = algorithm.policy.act(obs)
    assert ACTIONS[action].contains(given)
    assert str(given) == str(expected)
    assert (state is not None) == policy.has_memory
    batched = gym.vector.utils.batch_space(OBSERVATIONS[observation], 3).sample()
    actions, _ = policy.act(batched)
    rows = list(gym.vector.utils.iterate(gym.vector.utils.batch_space(ACTIONS[action], 3), actions))
    assert len(rows) == 3 and all(ACTIONS[action].contains(row) for row in rows)


@pytest.mark.parametrize(
    ("observation", "network"), grid(["vector", "whole numbers", "dict", "deep"], ["default", "GRU"], quick=["deep"])
)
@pytest.mark.parametrize("action", ["box", "tuple"])
def test_the_other_options_go_with_them(
    make_trainer: Callable[..., L.Trainer], observation: str, network: str, action: str
) -> None:
    options = {"normalize_observations": True, "normalize_returns": True, "state_dependent_std": True}
    algorithm = fit(make_trainer(), observation, NETWORKS[network], action, share_encoder=True, **options)
    moments = algorithm.policy.normalizer.moments
    assert moments and all(int(moment.count) == 32 for moment in moments.values())
    assert algorithm.policy.log_std is None


def test_separate_and_shared_value_encoders(make_trainer: Callable[..., L.Trainer]) -> None:
    sizes = {
        shared: sum(p.numel() for p in fit(make_trainer(), "image", None, "box", share_encoder=shared).parameters())
        for shared in (False, True, None)
    }
    assert sizes[False] == sizes[None] > 1.9 * sizes[True]


class OwnImageNetwork(nn.Module):
    """Bytes arrive as they are; the network decides what to make of them."""

    output_size = 4

    def __init__(self, observation_space: gym.Space):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, obs: Tensor) -> Tensor:
        assert obs.dtype == torch.uint8
        return torch.relu(self.layer(obs.permute(0, 3, 1, 2) / 255)).mean((2, 3))


def test_an_image_reaches_a_network_of_ones_own_as_bytes(make_trainer: Callable[..., L.Trainer]) -> None:
    algorithm = fit(make_trainer(), "small image", OwnImageNetwork, "discrete")
    assert algorithm.env_steps_done == 32


@pytest.mark.parametrize(
    ("observation", "action", "options", "words"),
    [
        ("discrete", "discrete", {"normalize_observations": True}, "normalize_observations=True"),
        ("image", "discrete", {"normalize_observations": True}, "no image"),
        ("vector", "discrete", {"state_dependent_std": True}, "state_dependent_std=True"),
        ("vector", "discrete", {"policy_class": MLP}, "policy_class="),
    ],
)
def test_options_that_do_not_fit_the_spaces_are_refused(
    make_trainer: Callable[..., L.Trainer], observation: str, action: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(LitRLError, match=words):
        fit(make_trainer(), observation, None, action, **options)


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Sequence(VECTOR), spaces.Dict(a=spaces.Text(3))], ids=str)
@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_spaces_that_are_not_handled_are_refused(
    make_trainer: Callable[..., L.Trainer], space: gym.Space, which: str
) -> None:
    both = {"observation_space": VECTOR, "action_space": spaces.Discrete(2)} | {which: space}
    with pytest.raises(LitRLError, match=r"is not supported"):
        make_trainer().fit(PPO(), RolloutDataModule(SampleEnv, env_kwargs=both, seed=0))


def test_episodes_of_nested_spaces_are_written_with_a_column_for_each_part(
    make_trainer: Callable[..., L.Trainer],
) -> None:
    data = RolloutDataModule(
        SampleEnv,
        env_kwargs={"observation_space": OBSERVATIONS["tuple"], "action_space": ACTIONS["tuple"]},
        rollout_length=128,
        max_env_steps=1024,
        evaluation=Evaluation(episodes=3),
        seed=0,
    )
    algorithm, trainer = PPO(), make_trainer(callbacks=[Record("out", evaluation=False)])
    trainer.fit(algorithm, data)
    trainer.predict(algorithm, data)
    table = pq.read_table("out/episodes-rank0-00000.parquet")
    parts = {name for name in table.column_names if "/" in name}
    assert parts == {"observation/0", "observation/1", "observation/2", "action/0", "action/1/x", "action/1/y"}
    assert table.num_rows == 12 and len(table["observation/0"][0].as_py()) == 3
    spec = EnvSpec.from_dict(json.loads(table.schema.metadata[b"lit_rl"])["spec"])
    assert spec.observation_space == OBSERVATIONS["tuple"]
    for row in table.filter(pc.invert(table["closing"]))["action/1/x"].to_pylist():
        assert ACTIONS["tuple"][1]["x"].contains(np.array(row, np.float32))


OFF_POLICY: dict[str, tuple[Any, str]] = {
    "Rainbow": (functools.partial(Rainbow, sequence_length=4), "discrete"),
    "SAC": (functools.partial(SAC, sequence_length=4, critic_hidden_sizes=(8,)), "matrix"),
    "TQC": (functools.partial(TQC, sequence_length=4, critic_hidden_sizes=(8,), num_quantiles=3), "discrete"),
    "BC": (functools.partial(BC, sequence_length=4), "tuple"),
    "CQL": (functools.partial(CQL, sequence_length=4, critic_hidden_sizes=(8,), lagrangian=True), "matrix"),
    "DiscreteCQL": (functools.partial(DiscreteCQL, sequence_length=4), "discrete"),
    "IQL": (functools.partial(IQL, sequence_length=4, critic_hidden_sizes=(8,)), "matrix"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OFF_POLICY)
@pytest.mark.parametrize("network", ["default", "LSTM"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_observation_is_learned_from_by_replay(
    make_trainer: Callable[..., L.Trainer], observation: str, network: str, kind: str
) -> None:
    """One update gives every parameter a finite gradient; the checkpoint's policy acts as the trained one."""
    make, action = OFF_POLICY[kind]
    torch.manual_seed(0)
    data = ReplayDataModule(
        SampleEnv,
        env_kwargs={"observation_space": OBSERVATIONS[observation], "action_space": ACTIONS[action]},
        num_envs_per_env_runner=2, rollout_length=8, max_env_steps=48, learning_starts=32, batch_size=16,
        buffer_size=100, update_to_data=1 / 16, evaluation=Evaluation(episodes=2), seed=0,
    )  # fmt: skip
    algorithm, trainer = make(network=NETWORKS[network], burn_in=2 if network == "LSTM" else 0), make_trainer()
    optimize, gradients = algorithm.optimize, {}

    def keep(loss: Tensor) -> bool:
        taken = optimize(loss)
        gradients.update({name: p.grad for name, p in algorithm.named_parameters() if p.requires_grad})
        return taken

    algorithm.optimize = keep
    trainer.fit(algorithm, data)
    assert algorithm.env_steps_done == 48 and algorithm.updates_done == 1 and gradients
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    trainer.save_checkpoint("out.ckpt")
    obs = OBSERVATIONS[observation].sample()
    given, _ = load_policy("out.ckpt").act(obs)
    assert ACTIONS[action].contains(given) and str(given) == str(algorithm.policy.act(obs)[0])
