"""Critics that see more than the policy, that normalise what they learn, that remember by themselves."""

import functools
from pathlib import Path
from typing import Any

import fake_ray
import lightning as L
import numpy as np
import pytest
import torch
from agent_envs import LoggedAgents
from gymnasium import spaces
from helpers import assert_same, quiet_trainer
from tensordict import TensorDict

from lit_rl import (
    APPO,
    IMPALA,
    MLP,
    PPO,
    SAC,
    Evaluation,
    GRUNetwork,
    LSTMNetwork,
    MultiAgent,
    MultiAgentEnv,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.envs.cooperation import Halves
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.losses import clipped_value_loss, value_loss
from lit_rl.networks import CentralCritic, ValueHead
from lit_rl.rollout import Rollout

SMALL: dict[str, Any] = {"minibatch_size": 32, "num_epochs": 1}


class Sum(MultiAgentEnv):
    """Two agents, each of which sees a sign of its own that stays for four steps; the reward is the signs' product.

    The state is both signs. All that there is to know of the return is in them and in the step, which all see.
    """

    possible_agents = ("a", "b")
    state_space = spaces.Box(-1, 1, (2,))

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(-1, 4, (2,))

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self._signs = np.random.default_rng(seed).choice([-1.0, 1.0], 2).astype(np.float32)
        self._t = 0
        return self._show(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        reward = dict.fromkeys(self.possible_agents, float(self._signs.prod()))
        return self._show(), reward, dict.fromkeys(self.possible_agents, self._t == 4), {}, {}

    def state(self) -> np.ndarray:
        return self._signs

    def _show(self) -> dict[str, np.ndarray]:
        return {agent: np.array([sign, self._t], np.float32) for agent, sign in zip(self.possible_agents, self._signs)}


def data(env: Any = Sum, **options: Any) -> RolloutDataModule:
    sizes = {"num_envs_per_env_runner": 2, "rollout_length": 16, "seed": 0, "evaluation": Evaluation(episodes=1)}
    return RolloutDataModule(env, **sizes | {"max_env_steps": 96} | options)


def fit(algorithm: Any, source: Any = None, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(**options)
    trainer.fit(algorithm, source or data(), ckpt_path=ckpt_path)
    return trainer


# --- what it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("state", 0.95, 1.0),
        pytest.param("observations", 0.95, 1.0, marks=pytest.mark.slow),
        pytest.param(None, -9, 0.6, marks=pytest.mark.slow),
    ],
)
def test_only_a_central_critic_explains_what_depends_on_what_another_agent_sees(
    kind: Any, least: float, most: float
) -> None:
    algorithm = PPO(central_critic=kind, lr=1e-3, gamma=0.95, minibatch_size=256, num_epochs=4)
    trainer = fit(algorithm, data(Halves, num_envs_per_env_runner=8, rollout_length=64, max_env_steps=16_384))
    assert least <= trainer.callback_metrics["value/explained_variance"] <= most


def test_the_critic_sees_the_observation_and_the_id_of_its_own_agent_too() -> None:
    algorithm = PPO(central_critic="state", **SMALL)
    fit(algorithm)
    obs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    state, agent_id = (
        torch.tensor([[1.0, -1.0]]).expand(3, 2),
        torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.uint8),
    )
    value = algorithm.value(obs, {"state": state, "agent_id": agent_id})
    assert len(value.unique()) == 3
    assert isinstance(algorithm.critic, CentralCritic)
    assert algorithm.critic.encoder.input.output_size == 2 + 2 + 2
    assert algorithm.policy.encoder.input.output_size == 2  # which sees its own


@pytest.mark.parametrize("cls", [PPO, IMPALA, APPO])
def test_central_inputs_are_normalised_with_the_observations(cls: Any) -> None:
    class Far(Sum):
        state_space = spaces.Box(-1e4, 1e4, (2,))

        def state(self) -> np.ndarray:
            return 1000 + self._signs

    algorithm = cls(central_critic="state", normalize_observations=True, **SMALL if cls is PPO else {})
    fit(algorithm, data(Far))
    moments = algorithm.critic.normalizer.moments
    assert set(moments) == {"state"}  # ids and who is there stay as they are
    torch.testing.assert_close(moments["state"].mean, torch.full((2,), 1000.0), atol=1.0, rtol=0)


# --- value targets ----------------------------------------------------------------------------------------------------


def test_statistics_of_targets_change_no_value_but_the_scale_of_losses() -> None:
    torch.manual_seed(0)
    head, features = ValueHead(3, normalize=True), torch.randn(5, 3)
    plain = ValueHead(3)
    plain.load_state_dict({name: x for name, x in head.state_dict().items() if name.startswith("linear")})
    for target, mask in (
        (torch.tensor([100.0, 300.0, 9e9]), torch.tensor([True, True, False])),
        (torch.tensor([-1000.0, 4000.0]), None),
        (torch.tensor([5.0, 5.0]), None),
    ):
        head.take_targets(target, mask)
        torch.testing.assert_close(head(features), plain(features), rtol=1e-3, atol=1e-2)
    head = ValueHead(3, normalize=True)
    head.take_targets(torch.tensor([100.0, 300.0]))
    assert head.normalized(torch.tensor([100.0, 200.0, 400.0])).tolist() == [-1.0, 0.0, 2.0]
    assert plain.normalized(features) is features
    head.take_targets(torch.tensor([200.0, 200.0]))  # half of all that was seen
    assert head.moments is not None and float(head.moments.var) == 5000.0


def test_older_targets_are_forgotten() -> None:
    head = ValueHead(1, normalize=True)
    for _ in range(1000):
        head.take_targets(torch.tensor([-1.0, 1.0]))
    for _ in range(200):
        head.take_targets(torch.tensor([90.0, 110.0]))
    assert head.moments is not None
    assert float(head.moments.mean) == pytest.approx(100.0, abs=0.1)
    assert float(head.moments.var) == pytest.approx(100.0, rel=0.05)


def test_targets_bootstrap_from_values_in_units_of_the_return() -> None:
    algorithm = PPO(normalize_values=True, normalize_returns=False, gamma=0.5, gae_lambda=0.0, **SMALL)
    kept: dict[str, Any] = {}

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            algorithm.critic.head.moments.mean.fill_(700.0)
            algorithm.critic.head.moments.var.fill_(100.0)
            kept["batch"] = batch
            with torch.no_grad():
                raw = algorithm.critic.head.linear(algorithm.critic.encoder(batch["observation"])).squeeze(-1)
                kept["value"] = 700 + 10 * raw

    fit(algorithm, data("CartPole-v1", max_env_steps=32), callbacks=[Keep()])
    rollout, value = kept["batch"], kept["value"]
    inside = ~rollout["next", "done"][:, :-1]
    expected = 1 + 0.5 * value[:, 1:]
    torch.testing.assert_close(rollout["value_target"][:, :-1][inside], expected[inside])
    assert (rollout["value_target"][rollout["next", "terminated"]] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_the_critics_loss_is_that_of_normalised_values(value_clip: Any) -> None:
    algorithm = PPO(normalize_values=True, value_clip=value_clip, value_coef=0.5, **SMALL)
    fit(algorithm, data("CartPole-v1", max_env_steps=64))
    head: Any = algorithm.critic.head
    head.moments.mean.fill_(20.0)
    head.moments.var.fill_(25.0)
    obs, target = torch.randn(4, 4), torch.tensor([0.0, 10.0, 30.0, 40.0])
    old = torch.tensor([5.0, 15.0, 20.0, 50.0])
    batch = TensorDict(
        {
            "observation": obs, "action": torch.zeros(4, dtype=torch.int64), "action_log_prob": torch.zeros(4),
            "advantage": torch.zeros(4), "value_target": target, "state_value": old,
        },
        [4],
    )  # fmt: skip
    with torch.no_grad():
        _, terms = algorithm.loss(batch)
        value = (algorithm.value(obs) - 20) / 5
    scaled, old = (target - 20) / 5, (old - 20) / 5
    expected = value_loss(value, scaled) if value_clip is None else clipped_value_loss(value, old, scaled, 0.2)
    torch.testing.assert_close(terms[1], expected.mean())


def test_values_are_normalised_where_it_is_asked_for_and_by_central_critics() -> None:
    def normalizes(**options: Any) -> bool:
        algorithm = PPO(**options, **SMALL)
        fit(algorithm, data(max_env_steps=32))
        return any("moments" in name and "critic" in name for name in algorithm.state_dict())

    assert normalizes(central_critic="state") and normalizes(normalize_values=True)
    assert normalizes(normalize_values=True, share_encoder=True)
    assert not normalizes() and not normalizes(central_critic="state", normalize_values=False)


def test_padding_is_in_no_statistic_of_targets_and_advantages() -> None:
    """Rows of agents that are not there hold anything: what is learned is the same."""

    def updated(garbage: float) -> dict[str, torch.Tensor]:
        algorithm = PPO(central_critic="observations", normalize_observations=True, minibatch_size=64, num_epochs=2)

        class Spoil(L.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Rollout, batch_idx: int) -> None:
                padding = ~batch["mask"]
                assert padding.any()
                for key in (("next", "reward"), "observation", "action_log_prob"):
                    batch[key][padding] = garbage
                for leaf in batch["central"].values(True, True):
                    leaf[padding] = int(garbage)

        source = data(LoggedAgents, env_kwargs={"mode": "random", "num_agents": 3}, max_env_steps=96)
        fit(algorithm, source, callbacks=[Spoil()])
        return algorithm.state_dict()

    assert_same(updated(0.0), updated(99.0))


# --- memory -----------------------------------------------------------------------------------------------------------


class Recalls(Sum):
    """`Sum`, whose state shows the signs in the first step alone: a critic that remembers knows them later."""

    def state(self) -> np.ndarray:
        return self._signs if self._t == 0 else np.zeros(2, np.float32)

    def _show(self) -> dict[str, np.ndarray]:
        return {agent: np.array([0.0, self._t], np.float32) for agent in self.possible_agents}


@pytest.mark.slow
@pytest.mark.parametrize(("network", "least", "most"), [(GRUNetwork, 0.9, 1.0), (None, -9, 0.6)])
def test_a_critic_has_a_memory_of_its_own_beside_a_policy_without(network: Any, least: float, most: float) -> None:
    algorithm = PPO(
        central_critic="state", critic_network=network, lr=3e-3, gamma=0.9, minibatch_size=64, num_epochs=4,
        sequence_length=8,
    )  # fmt: skip
    trainer = fit(algorithm, data(Recalls, num_envs_per_env_runner=8, max_env_steps=8192))
    assert not algorithm.policy.has_memory
    assert least <= trainer.callback_metrics["value/explained_variance"] <= most


@pytest.mark.parametrize("network", [None, LSTMNetwork])
def test_the_critics_memory_goes_on_from_rollout_to_rollout(network: Any) -> None:
    """The values of two short rollouts are those of one long one, where nothing is learned."""

    def values(length: int) -> torch.Tensor:
        found: list[list[torch.Tensor]] = [[] for _ in range(4)]

        class Watch(PPO):
            def values(self, rollout: Any) -> Any:
                result = super().values(rollout)
                for b, steps in enumerate(rollout["length"].tolist()):
                    found[b].append(result[0][b, :steps])
                return result

        algorithm = Watch(
            central_critic="state", critic_network=LSTMNetwork, network=network, normalize_values=False,
            lr_schedule=[[0, 0.0], [1, 0.0]], sequence_length=2, num_epochs=1, minibatch_size=8,
        )  # fmt: skip
        fit(algorithm, data(rollout_length=length, max_env_steps=56))
        return torch.stack([torch.cat(rows) for rows in found])

    short = values(14)  # in the middle of an episode
    assert short.shape == (4, 28)
    torch.testing.assert_close(short, values(28))


@pytest.mark.parametrize(
    ("make", "source", "sentence"),
    [
        (lambda: IMPALA(central_critic="state", critic_network=GRUNetwork), {}, "critic_network=GRUNetwork: expected"),
        (lambda: PPO(critic_network=MLP, share_encoder=True), {}, "critic_network: expected none, since the critic sh"),
        (
            lambda: PPO(critic_network=GRUNetwork, sequence_length=5, **SMALL), {},
            "sequence_length=5: expected a divisor of rollout_length=16",
        ),
        (
            lambda: PPO(central_critic="state", critic_network=GRUNetwork, **SMALL),
            {"num_env_runners": 1, "prefetch": 2}, "a critic with memory goes on from rollout to rollout: expected all",
        ),
        (lambda: PPO(central_critic="stat"), {}, "central_critic='stat'"),
    ],
)  # fmt: skip
def test_critics_that_cannot_be_are_refused(
    make: Any, source: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source:
        fake_ray.use(monkeypatch, 1.0)
    with pytest.raises(OptionError, match=sentence):
        fit(make(), data(**source))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"central_critic": "state"},
        {"central_critic": "observations", "critic_network": functools.partial(MLP, hidden_sizes=[8])},
        {"central_critic": "observations", "critic_network": LSTMNetwork, "sequence_length": 4},
        {"normalize_values": True, "share_encoder": True},
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_is_the_unbroken_one(options: dict[str, Any], several: bool, tmp_path: Path) -> None:
    def make() -> Any:
        algorithm = PPO(normalize_observations=True, **options, **SMALL)
        return MultiAgent({"a": algorithm, "b": PPO(**SMALL)}) if several else algorithm

    def source(steps: int) -> RolloutDataModule:
        return data(max_env_steps=steps, rollouts_per_epoch=1)

    unbroken = make()
    fit(unbroken, source(192))
    first = make()
    fit(first, source(96)).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    fit(resumed, source(192), ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), unbroken.state_dict())
    loaded = type(first).load_from_checkpoint(tmp_path / "half.ckpt")
    assert_same(loaded.state_dict(), first.state_dict())
    obs = np.array([1.0, 2.0], np.float32)
    policy = load_policy(tmp_path / "half.ckpt")
    policy.act({"a": obs} if several else obs)


def test_a_critics_own_network_is_in_checkpoints_of_off_policy_algorithms_too(tmp_path: Path) -> None:
    algorithm = SAC(critic_network=functools.partial(MLP, hidden_sizes=[8]))
    source = ReplayDataModule("Pendulum-v1", batch_size=16, learning_starts=16, max_env_steps=64)
    fit(algorithm, source, limit_val_batches=0).save_checkpoint(tmp_path / "sac.ckpt")
    assert_same(SAC.load_from_checkpoint(tmp_path / "sac.ckpt").state_dict(), algorithm.state_dict())


class Own(MLP):
    """A network that lit_rl does not know."""


def test_a_critics_network_of_ones_own_is_asked_for_by_its_option(tmp_path: Path) -> None:
    algorithm = PPO(critic_network=Own, **SMALL)
    fit(algorithm).save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match="pass it as critic_network="):
        PPO.load_from_checkpoint(tmp_path / "own.ckpt")
    assert_same(
        PPO.load_from_checkpoint(tmp_path / "own.ckpt", critic_network=Own).state_dict(), algorithm.state_dict()
    )
    load_policy(tmp_path / "own.ckpt")


def test_another_number_of_agents_is_refused(tmp_path: Path) -> None:
    def source(num_agents: int) -> RolloutDataModule:
        return data(LoggedAgents, env_kwargs={"mode": "together", "num_agents": num_agents})

    algorithm = PPO(central_critic="observations", **SMALL)
    fit(algorithm, source(2)).save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(OptionError, match=r"The weights are for .* central inputs"):
        fit(PPO.load_from_checkpoint(tmp_path / "two.ckpt"), source(3))


def test_a_critic_with_memory_is_refused_where_its_policy_learns_in_turns() -> None:
    policies = {"a": PPO(central_critic="state", critic_network=LSTMNetwork, **SMALL), "b": PPO(**SMALL)}
    with pytest.raises(OptionError, match="a critic with memory goes on from rollout to rollout: expected all"):
        fit(MultiAgent(policies, train=lambda update: ["a"]))


def test_a_critic_that_normalises_is_not_begun_from_in_other_units(tmp_path: Path) -> None:
    source = PPO(central_critic="state", **SMALL)
    fit(source).save_checkpoint(tmp_path / "from.ckpt")

    def begun(**options: Any) -> Any:
        algorithm = PPO(central_critic="state", **options, **SMALL)
        algorithm.init_from = str(tmp_path / "from.ckpt")
        fit(algorithm, max_epochs=0)
        return algorithm.critic

    same, other = begun(), begun(normalize_values=False)
    assert_same(same.state_dict(), source.critic.state_dict())
    source_critic: Any = source.critic
    assert_same(other.encoder.state_dict(), source_critic.encoder.state_dict())
    assert not torch.equal(other.head.linear.weight, same.head.linear.weight)


def test_agents_that_are_not_there_are_in_no_statistic_of_central_inputs_and_stay_zeros() -> None:
    space = spaces.Dict(
        observations=spaces.Tuple([spaces.Box(0, 9, (1,)), spaces.Box(0, 9, (1,))]), alive=spaces.MultiBinary(2)
    )
    critic = CentralCritic(None, spaces.Box(-1, 1, (1,)), space, normalize=False, normalize_inputs=True)
    first, second = torch.tensor([[5.0], [7.0], [6.0]]), torch.tensor([[2.0], [0.0], [4.0]])
    central = {"observations": {"0": first, "1": second}, "alive": torch.tensor([[1, 1], [1, 0], [1, 1]])}
    critic.take_inputs(central, torch.tensor([True, True, False]))
    assert critic.normalizer is not None
    moments: Any = critic.normalizer.moments
    assert {name: float(x.mean) for name, x in moments.items()} == {"observations/0": 6.0, "observations/1": 2.0}
    seen = critic.joined(torch.zeros(3, 1), central)["central"]["observations"]
    assert seen["0"].squeeze(1).tolist() == [-1.0, 1.0, 0.0] and seen["1"][1] == 0 != seen["1"][2]


def test_statistics_are_of_the_rows_of_agents_that_are_there() -> None:
    rows = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            real = batch["mask"]
            assert not real.all()
            advantage = batch["advantage"][real]
            assert abs(float(advantage.mean())) < 1e-5
            assert float(advantage.std()) == pytest.approx(1.0, abs=1e-4)
            rows.append(int(real.sum()))
            assert int(module.critic.head.moments.count) == sum(rows)

    source = data(LoggedAgents, env_kwargs={"mode": "random", "num_agents": 3}, max_env_steps=96)
    fit(PPO(central_critic="observations", minibatch_size=64, num_epochs=1), source, callbacks=[Look()])
