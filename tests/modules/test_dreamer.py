"""DreamerV3: its sizes, its terms by hand, what reaches what, and that it learns."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from envs import IdentityEnv, MaskedEnv, TargetEnv, TurningEnv
from gymnasium import spaces
from helpers import greedy_return, quiet_trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict

from lit_rl import (
    DQN,
    PPO,
    DreamerV3,
    Evaluation,
    LatentPolicy,
    LSTMNetwork,
    Predictions,
    ReplayDataModule,
    RolloutDataModule,
    load_policy,
)
from lit_rl.callbacks.predictions import draw_images
from lit_rl.errors import OptionError, SpaceError
from lit_rl.learner.clipping import Clipping
from lit_rl.learner.compiled import CompiledStep
from lit_rl.modules.dreamer_v3 import SIZES, behaviour
from lit_rl.modules.dreamer_v3.behaviour import Imagined, imagine, policy_loss, replay_value_loss, targets_of
from lit_rl.modules.dreamer_v3.world_model import TwoHotHead
from lit_rl.networks import rssm_scan
from lit_rl.normalizer import ReturnRange
from lit_rl.spec import EnvSpec

VECTOR = spaces.Box(-10, 10, (3,), np.float32)
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-2, 4, (2,), np.float32)
B, L, H = 4, 6, 3


def make(obs: spaces.Space = VECTOR, action: spaces.Space = DISCRETE, **options: Any) -> DreamerV3:
    torch.manual_seed(0)
    spec = EnvSpec("Test", obs, action).to_dict()
    algorithm = DreamerV3(spec=spec, **{"size": "nano", "sequence_length": L, "horizon": H} | options)
    algorithm.configure_model()
    return algorithm


def minibatch(algorithm: DreamerV3, rows: tuple[int, int] = (B, L), **more: Any) -> TensorDict:
    """Sequences in which an episode ends by termination in row 2 of the first, by truncation in row 3 of the second."""
    g, spec = torch.Generator().manual_seed(0), algorithm.spec
    spec.observation_space.seed(0)
    samples = [spec.observation_space.sample() for _ in range(rows[0] * rows[1])]
    action = torch.randint(3, rows, generator=g)
    if isinstance(spec.action_space, spaces.Box):
        action = torch.randn(*rows, 2, generator=g)
    is_last, is_terminal = torch.zeros(2, *rows, dtype=torch.bool)
    if rows == (B, L):
        is_last[0, 2] = is_terminal[0, 2] = is_last[1, 3] = True
    is_first = torch.cat([torch.zeros_like(is_last[:, :1]), is_last[:, :-1]], 1)
    state = {name: torch.from_numpy(x) for name, x in algorithm.policy.initial_state(rows[0]).items()}
    state["deter"] = torch.randn(state["deter"].shape, generator=g)
    batch = {
        "observation": torch.as_tensor(np.stack(samples)).unflatten(0, rows), "previous_action": action,
        "reward": torch.randn(rows, generator=g) * ~is_first, "is_first": is_first, "is_last": is_last,
        "is_terminal": is_terminal, "state": state, **more,
    }  # fmt: skip
    found = TensorDict(batch, rows[:1])
    algorithm.draw_noise(found)
    return found


def world_model_losses(algorithm: DreamerV3, batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any], Any]:
    return algorithm.model.losses(algorithm.policy, batch, gamma=0.9, free_bits=0.0)


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def size_of(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_size1m_has_the_authors_number_of_parameters_for_walker() -> None:
    # dmc_walker_walk by proprioception: 24 numbers observed, 6 of an action. 640,867 as the author's code prints it.
    algorithm = make(spaces.Box(-1, 1, (24,), np.float32), spaces.Box(-1, 1, (6,), np.float32), size="size1m")
    policy, model = algorithm.policy, algorithm.model
    counts = {
        "encoder": size_of(policy.encoder.encoder), "rssm": size_of(policy.encoder.rssm),
        "decoder": size_of(model.vectors), "reward": size_of(model.reward), "continue": size_of(model.continues),
        "actor": size_of(policy.head), "critic": size_of(algorithm.critic),
    }  # fmt: skip
    assert counts == {
        "encoder": 10_112, "rssm": 364_416, "decoder": 51_096, "reward": 57_663, "continue": 41_153, "actor": 50_316,
        "critic": 66_111,
    }  # fmt: skip
    assert sum(counts.values()) == 640_867


def test_sizes_grow_and_each_number_can_be_set() -> None:
    names = list(SIZES)
    assert names[:3] == ["nano", "micro", "size1m"] and len(names) == 9
    for name, larger in itertools.pairwise(names):
        assert all(SIZES[name][key] <= SIZES[larger][key] for key in SIZES[name])
    algorithm = make(deter=48, hidden=8, stoch=2, classes=3, units=10, layers=2, blocks=4, bins=7)
    rssm = algorithm.policy.encoder.rssm
    assert (rssm.deter, rssm.stoch, rssm.classes, rssm.blocks, algorithm.critic.bins.numel()) == (48, 2, 3, 4, 7)
    assert algorithm.policy.encoder.output_size == 48 + 6
    images = make(spaces.Box(0, 255, (64, 64, 3), np.uint8), depth=6)
    assert images.policy.encoder.encoder.convolutions[3].convolution.out_channels == 24


# --- the world model ------------------------------------------------------------------------------------------------


def test_latents_know_the_observation_of_their_row_and_the_recurrent_state_only_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    algorithm = make()
    batch = minibatch(algorithm)
    other = batch.clone()
    other["observation"][3, 2] = 10 - other["observation"][3, 2]
    rssm, found = algorithm.policy.encoder.rssm, []

    def observe(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found.append(type(rssm).observe(rssm, *inputs))
        return found[-1]

    monkeypatch.setattr(rssm, "observe", observe)
    losses = [world_model_losses(algorithm, each)[0] for each in (batch, other)]
    for name, at_row in (("deter", False), ("logits", True)):
        first, second = (x[0 if name == "deter" else 2] for x in found)
        changed = (first != second).any(-1)
        assert not changed[:3].any() and not changed[3, :2].any() and bool(changed[3, 2]) == at_row, name
    kl = losses[0]["dynamics"] - losses[1]["dynamics"]  # of the posterior, which alone knows what was observed
    assert kl[3, 2] != 0 and (kl[3, :2] == 0).all()


def test_the_policy_acts_on_the_latents_that_are_learned_from() -> None:
    algorithm = make()
    batch, network = minibatch(algorithm), algorithm.policy.encoder
    obs, action = algorithm.policy.inputs(batch["observation"]), algorithm.policy.as_numbers(batch["previous_action"])
    state, noise, never = batch["state"], batch["posterior_noise"], torch.zeros(B, L, dtype=torch.bool)
    deter, stoch, _ = network.rssm.observe(network.encoder(obs), action, never, state["deter"], state["stoch"], noise)
    for t in range(L):
        before = {"deter": state["deter"], "stoch": state["stoch"], "action": action[:, t]}
        features, state = network(obs[:, t], before, noise[:, t])
        torch.testing.assert_close(features, torch.cat([deter[:, t], stoch[:, t]], -1))


def test_a_rows_reward_is_predicted_from_the_row_at_which_it_arrives() -> None:
    algorithm = make()
    torch.nn.init.normal_(algorithm.model.reward.logits.weight)
    # So that samples follow observations.
    torch.nn.init.normal_(algorithm.policy.encoder.rssm.posterior[1].weight, std=9.0)
    batch = minibatch(algorithm)
    before = world_model_losses(algorithm, batch)[0]["reward"]
    for key in ("reward", "observation"):
        other = batch.clone()
        other[key][3, 2] *= -3.0
        changed = world_model_losses(algorithm, other)[0]["reward"] != before
        assert changed[3, 2] and not changed[:3].any() and not changed[3, :2].any()
        assert key == "observation" or changed.sum() == 1


def test_only_a_termination_ends_what_is_worth_continuing() -> None:
    algorithm = make()
    batch = minibatch(algorithm)
    losses, _, features = world_model_losses(algorithm, batch)
    chance = torch.sigmoid(algorithm.model.continues(features).squeeze(-1))
    target = torch.full((B, L), 0.9)  # gamma
    target[0, 2] = 0.0  # and not row 3 of the second sequence, which is truncated
    expected = -(target * chance.log() + (1 - target) * (1 - chance).log())
    torch.testing.assert_close(losses["continue"], expected)


def test_the_dynamics_loss_moves_the_prior_and_the_representation_loss_the_posterior() -> None:
    algorithm = make()
    losses, _, _ = world_model_losses(algorithm, minibatch(algorithm, (B, 1)))  # no row before, through which to go
    rssm = algorithm.policy.encoder.rssm
    for name, moved, still in (
        ("dynamics", rssm.prior, rssm.posterior),
        ("representation", rssm.posterior, rssm.prior),
    ):
        assert not any(g is not None and (g != 0).any() for g in gradients(losses[name].sum(), still)), name
        assert any(g is not None and (g != 0).any() for g in gradients(losses[name].sum(), moved)), name


def test_vectors_are_predicted_as_their_symlog_and_whole_numbers_by_their_class() -> None:
    space = spaces.Dict({"box": spaces.Box(-9, 9, (2,)), "one": spaces.Discrete(4, start=2)})
    algorithm = make(space)
    decoder, features = algorithm.model.vectors, torch.randn(B, L, algorithm.policy.encoder.output_size)
    obs = {"box": torch.randn(B, L, 2) * 5, "one": torch.randint(2, 6, (B, L))}
    predicted = decoder(features)
    squared = (predicted["box"] - obs["box"].sign() * obs["box"].abs().log1p()).square().sum(-1)
    entropy = torch.nn.functional.cross_entropy(
        predicted["one"].flatten(0, 1), obs["one"].flatten() - 2, reduction="none"
    )
    torch.testing.assert_close(decoder.loss(features, obs), squared + entropy.view(B, L))


@pytest.mark.parametrize("layout", ["last", "first", "grey"])
def test_images_are_predicted_pixel_by_pixel(layout: str) -> None:
    shape = {"last": (64, 48, 3), "first": (3, 64, 48), "grey": (64, 48)}[layout]
    algorithm = make(spaces.Box(0, 255, shape, np.uint8))
    batch = minibatch(algorithm, (1, 2))
    losses, latents, _ = world_model_losses(algorithm, batch)
    predicted = algorithm.model.images(latents["deter"], latents["stoch"])[""]
    assert predicted.shape == (1, 2, 1 if layout == "grey" else 3, 64, 48)
    image = batch["observation"].float() / 255
    if layout == "last":
        image = image.permute(0, 1, 4, 2, 3)
    expected = (predicted - image.reshape(predicted.shape)).square().sum((-3, -2, -1))
    torch.testing.assert_close(losses["observation"], expected)


# --- the behaviour --------------------------------------------------------------------------------------------------


def test_targets_of_what_is_imagined_equal_a_table() -> None:
    # Two steps; the chance to go on, which holds the discount, is 1/2 and 1/4 on arriving. lambda = 1/2.
    imagined = Imagined(
        features=torch.zeros(3, 1, 2), action=torch.zeros(2, 1, 1), reward=torch.tensor([[50.0], [1.0], [2.0]]),
        discount=torch.tensor([[0.8], [0.5], [0.25]]),
    )  # fmt: skip
    value = torch.tensor([[10.0], [4.0], [8.0]])
    last = 2 + 0.25 * 8
    first = 1 + 0.5 * (0.5 * 4 + 0.5 * last)
    returns_range = ReturnRange(rate=1.0)
    targets = targets_of(imagined, value, returns_range, lambda_=0.5, normalize=True)
    torch.testing.assert_close(targets.returns, torch.tensor([[first], [last]]))
    low, high = np.percentile([first, last], [5, 95])
    torch.testing.assert_close(targets.limits.tolist(), [float(low), float(high)])
    scale = max(1.0, high - low)
    torch.testing.assert_close(targets.advantage, torch.tensor([[(first - 10) / scale], [(last - 4) / scale]]).float())
    torch.testing.assert_close(targets.weight, torch.tensor([[0.8], [0.8 * 0.5]]))
    plain = targets_of(imagined, value, returns_range, lambda_=0.5, normalize=False)
    torch.testing.assert_close(plain.advantage, torch.tensor([[first - 10], [last - 4]]))


def test_the_advantage_is_divided_by_the_range_of_returns_and_not_moved_by_it() -> None:
    reward = torch.zeros(2, 2)
    reward[1, 1] = 100.0
    imagined = Imagined(torch.zeros(2, 2, 1), torch.zeros(1, 2, 1), reward + 1000, torch.ones(2, 2) * 0.5)
    targets = targets_of(imagined, torch.zeros(2, 2), ReturnRange(rate=1.0), lambda_=0.5, normalize=True)
    torch.testing.assert_close(targets.scale.item(), 90.0)  # between 1005 and 1095
    torch.testing.assert_close(targets.advantage, torch.tensor([[1000 / 90, 1100 / 90]]))


def test_imagination_goes_by_the_prior_alone_and_discounts_once() -> None:
    algorithm = make()
    batch = minibatch(algorithm)
    _, latents, _ = world_model_losses(algorithm, batch)
    policy, model = algorithm.policy, algorithm.model
    del policy.encoder.rssm.posterior  # nobody asks it
    starts = (latents["deter"], latents["stoch"], batch["latent_noise"], batch["action_noise"])
    imagined = imagine(policy, model, *(x.flatten(0, 1) for x in starts))
    assert imagined.features.shape == (H + 1, B * L, policy.encoder.output_size)
    assert imagined.action.shape == (H, B * L, 3) and (imagined.action.sum(-1) == 1).all()
    torch.testing.assert_close(imagined.features[0], torch.cat(list(latents.values()), -1).flatten(0, 1))
    torch.testing.assert_close(imagined.discount, torch.sigmoid(model.continues(imagined.features).squeeze(-1)))
    assert (imagined.reward == 0).all()  # before anything is learned, exactly
    deter, stoch = (latents[name].flatten(0, 1) for name in ("deter", "stoch"))
    rssm = policy.encoder.rssm
    following = rssm.step(deter, stoch, rssm.embed(imagined.action[0]))
    torch.testing.assert_close(imagined.features[1, :, : rssm.deter], following)


@pytest.mark.parametrize("action", [DISCRETE, BOX], ids=["discrete", "box"])
def test_actor_and_critic_leave_the_world_models_gradients_at_exactly_zero(action: spaces.Space) -> None:
    algorithm = make(action=action)
    batch = minibatch(algorithm)
    for module in (algorithm.model.reward, algorithm.model.continues):  # so that there are returns to learn from
        torch.nn.init.normal_(list(module.parameters())[-2])
    model_weights = ("dynamics", "representation", "observation", "reward", "continue", "replay_value")
    weights = algorithm.weights
    for only, learns in (("policy", algorithm.policy.head), ("value", algorithm.critic)):
        none = dict.fromkeys(weights, 0.0) | {only: 1.0}
        type(algorithm).weights, kept = property(lambda _, none=none: none), type(algorithm).weights
        try:
            loss = algorithm.loss(batch)[0]
        finally:
            type(algorithm).weights = kept
        for module in (algorithm.policy.encoder, algorithm.model, algorithm.policy.head, algorithm.critic):
            found = [g for g in gradients(loss, module) if g is not None and (g != 0).any()]
            assert bool(found) == (module is learns), (only, type(module).__name__)
    assert set(model_weights) | {"policy", "value"} == set(weights)


def test_the_policys_loss_is_reinforce_with_an_entropy_bonus() -> None:
    algorithm = make()
    n = 5
    imagined = Imagined(
        torch.randn(H + 1, n, algorithm.policy.encoder.output_size),
        torch.nn.functional.one_hot(torch.randint(3, (H, n)), 3).float(),
        torch.randn(H + 1, n),
        torch.rand(H + 1, n),
    )
    targets = targets_of(imagined, torch.randn(H + 1, n), ReturnRange(1.0), lambda_=0.9, normalize=True)
    loss, entropy = policy_loss(algorithm.policy, imagined, targets, entropy_coef=0.5)
    logits = algorithm.policy.head(imagined.features[:-1])
    theirs = torch.distributions.Categorical(0.99 * logits.softmax(-1) + 0.01 / 3)
    log_prob = theirs.log_prob(imagined.action.argmax(-1))
    torch.testing.assert_close(entropy, theirs.entropy())
    torch.testing.assert_close(loss, -targets.weight * (log_prob * targets.advantage + 0.5 * theirs.entropy()))


def test_the_replayed_values_bootstrap_from_imagined_returns_and_leave_last_rows_out() -> None:
    torch.manual_seed(0)
    critic, slow = (TwoHotHead(2, units=4, layers=1, bins=5) for _ in range(2))
    torch.nn.init.normal_(critic.logits.weight)
    features = torch.randn(2, 4, 2, requires_grad=True)
    # Row 2 of the first sequence is an end by termination, row 1 of the second by truncation.
    is_last = torch.tensor([[False, False, True, False], [False, True, False, False]])
    batch = {
        "reward": torch.tensor([[5.0, 1.0, 2.0, 0.0]]).repeat(2, 1), "is_last": is_last,
        "is_terminal": is_last & torch.tensor([[True], [False]]),
    }  # fmt: skip
    bootstrap = torch.tensor([[70.0, 40.0, 90.0, 90.0]]).repeat(2, 1)
    loss = replay_value_loss(critic, slow, features, TensorDict(batch, [2]), bootstrap, gamma=0.5, lambda_=0.5)
    terminated = 2.0  # nothing follows
    before = 1 + 0.5 * (0.5 * 40 + 0.5 * terminated)
    truncated, after = 1 + 0.5 * 40, 0.5 * 90
    log_probs = critic(features)[:, :-1]
    target = torch.tensor([[before, terminated, 0.0], [truncated, 0.0, after]])
    to_slow = critic.loss(log_probs, torch.zeros(2, 3))  # of a critic that knows nothing yet
    torch.testing.assert_close(loss, (critic.loss(log_probs, target) + to_slow) * ~is_last[:, :-1])
    gradient = torch.autograd.grad(loss.sum(), features)[0]  # it shapes the latents
    assert torch.equal((gradient != 0).any(-1), torch.nn.functional.pad(~is_last[:, :-1], (0, 1)))


# --- the update -----------------------------------------------------------------------------------------------------


def test_an_update_moves_everything_and_gives_latents_back() -> None:
    algorithm = make(warmup=0, lr=1e-3)
    batch, optimizer = minibatch(algorithm), algorithm.configure_optimizers()
    before = {name: x.clone() for name, x in algorithm.state_dict().items()}

    def optimize(loss: torch.Tensor) -> bool:
        loss.backward()
        optimizer.step()
        return True

    algorithm.optimize = optimize  # type: ignore[assignment]
    algorithm.update(batch)  # which leaves what is before a last layer of zeros
    batch = minibatch(algorithm)
    metrics = algorithm.update(batch)
    for name, value in algorithm.state_dict().items():
        assert not torch.equal(value, before[name]) or name in ("env_steps", "updates") or "scale" in name, name
    assert batch["latents", "deter"].shape == (B, L, 32) and batch["latents", "stoch"].shape == (B, L, 16)
    assert not batch["latents", "deter"].requires_grad
    for name in algorithm.weights:
        assert torch.isfinite(metrics[f"loss/{name}"])


def test_an_update_that_was_skipped_keeps_the_slow_critic_and_the_range_of_returns() -> None:
    algorithm = make()
    algorithm.optimize = lambda loss: False  # type: ignore[assignment]
    before = {name: x.clone() for name, x in algorithm.state_dict().items()}
    batch = minibatch(algorithm)
    algorithm.update(batch)
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "latents" not in batch.keys()  # noqa: SIM118


def test_bf16_gives_the_losses_of_float32() -> None:
    algorithm = make(layers=2)
    batch = minibatch(algorithm)
    with torch.autocast("cpu", torch.bfloat16):
        half, (latents, _, terms) = algorithm.loss(batch)
    whole, (_, _, expected) = algorithm.loss(batch)
    assert half.dtype == torch.float32 and latents["deter"].shape == (B, L, 32)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.0)
    torch.testing.assert_close(terms[:5], expected[:5], rtol=0.1, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):  # as a Trainer with bf16-mixed does
        half.backward()
    found = [p.grad for p in algorithm.parameters() if p.grad is not None]
    assert found and all(g.dtype == torch.float32 and g.isfinite().all() for g in found)


def test_an_open_loop_sees_the_first_rows_alone() -> None:
    space = spaces.Dict({"box": VECTOR, "one": spaces.Discrete(4, start=2)})
    algorithm = make(space)
    batch = minibatch(make(VECTOR))
    batch["observation"] = {"box": batch["observation"].clone(), "one": torch.randint(2, 6, (B, L))}
    compared = algorithm.open_loop(batch, context=2)
    assert {path: true.shape[2:] for path, (true, _) in compared.items()} == {"box": (3,), "one": (4,)}
    assert torch.equal(compared["box"][0], batch["observation", "box"])
    assert torch.equal(compared["one"][0].argmax(-1) + 2, batch["observation", "one"])
    torch.testing.assert_close(compared["one"][1].sum(-1), torch.ones(B, L))
    later, earlier = batch.clone(), batch.clone()
    later["observation", "box"][:, 2:] += 5.0
    earlier["previous_action"][:, 3] = (earlier["previous_action"][:, 3] + 1) % 3
    for other, same in ((later, L), (earlier, 3)):
        predicted = algorithm.open_loop(other, context=2)["box"][1]
        assert torch.equal(predicted[:, :same], compared["box"][1][:, :same])
        assert same == L or not torch.equal(predicted[:, same:], compared["box"][1][:, same:])


@pytest.mark.slow
def test_a_compiler_sees_loops_as_operators_and_steps_as_an_eager_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as ever; only what makes C++ of it is left out, which takes minutes.
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compiler(function, backend="aot_eager", fullgraph=True, dynamic=False)
    )
    for module in (rssm_scan, behaviour):
        monkeypatch.setattr(module, "step_of", lambda function, *_: function)
    eager, compiled = make(blocks=2, warmup=0, lr=1e-3), make(blocks=2, warmup=0, lr=1e-3, compile=True)
    compiled.load_state_dict(eager.state_dict())
    optimizer, inner = eager.configure_optimizers(), compiled.configure_optimizers()
    step = CompiledStep(compiled, LightningOptimizer(inner), Clipping(None, "global_norm"))
    for _ in range(2):  # in the first, the gradients of what is before a last layer of zeros are 0
        batch = minibatch(eager)
        loss, (latents, limits, terms) = eager.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found, norm, (own_latents, own_limits, own_terms) = step(batch)
        expected = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).norm()
        torch.testing.assert_close((found, norm, own_limits, own_terms), (loss.detach(), expected, limits, terms))
        torch.testing.assert_close(own_latents, latents)
    for own, parameter in zip(compiled.parameters(), eager.parameters()):
        torch.testing.assert_close(own, parameter, rtol=1e-3, atol=1e-4)


# --- in a run -------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "num_envs_per_env_runner": 2, "learning_starts": 64, "batch_size": 4 * L, "buffer_size": 400,
    "env_steps_per_batch": 40, "update_to_data": 0.1, "seed": 0, "evaluation": Evaluation(episodes=2),
}  # fmt: skip


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_checkpoints_policy_acts_by_its_latents(env: str, tmp_path: Any) -> None:
    algorithm = DreamerV3(size="nano", sequence_length=L, horizon=H)
    data, trainer = ReplayDataModule(env, max_env_steps=120, **RUN), quiet_trainer()
    trainer.fit(algorithm, data)
    assert algorithm.updates_done == int(0.1 * (120 - 64)) and algorithm.env_steps_done == 120
    assert trainer.callback_metrics["replay/ratio"] == pytest.approx(5 * 4 * L / 120)
    trainer.save_checkpoint(tmp_path / "dreamer.ckpt")
    policy = load_policy(tmp_path / "dreamer.ckpt")
    assert isinstance(policy, LatentPolicy)
    space = data.spec.observation_space
    obs = [space.sample() for _ in range(3)]
    state, own = None, None
    for one in obs:
        action, state = policy.act(one, state)
        same, own = algorithm.policy.act(one, own)
        np.testing.assert_array_equal(action, same)
        assert data.spec.action_space.contains(action)
        np.testing.assert_array_equal(state["deter"], own["deter"])
    assert (state["deter"] != 0).any() and state["action"].shape == (1, policy.encoder.num_actions)
    again, _ = policy.act(obs[-1], None)
    assert policy.act(obs[-1], policy.reset_state(state, [True]))[0] == pytest.approx(again)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_runners_in_other_processes_send_their_latents_with_the_rows() -> None:
    algorithm = DreamerV3(size="nano", sequence_length=L, horizon=H)
    data = ReplayDataModule("CartPole-v1", max_env_steps=160, num_env_runners=2, rollout_length=4, **RUN)
    quiet_trainer().fit(algorithm, data)
    assert algorithm.updates_done > 0
    batch = data.buffer.peek(64, np.random.default_rng(0))
    goes_on = ~batch["is_first"][:, 0]
    action = algorithm.policy.as_numbers(batch["previous_action"][:, 0])
    torch.testing.assert_close(batch["state", "action"][goes_on], action[goes_on])


def test_predictions_are_drawn_and_training_goes_on_as_without_them(tmp_path: Any) -> None:
    def fit(*callbacks: Any) -> Any:
        algorithm = DreamerV3(size="nano", sequence_length=L, horizon=H)
        data = ReplayDataModule("CartPole-v1", max_env_steps=120, **RUN | {"batches_per_epoch": 1})
        quiet_trainer(default_root_dir=tmp_path, callbacks=list(callbacks)).fit(algorithm, data)
        return algorithm

    drawn, plain = fit(Predictions(every_n_evaluations=1, sequences=2, context=2)), fit()
    names = [path.name for path in sorted((tmp_path / "predictions").iterdir())]
    assert names == ["000000040.png", "000000080.png", "000000120.png"]
    for name, value in plain.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], value), name


def test_images_are_drawn_with_what_is_predicted_and_the_difference(tmp_path: Any) -> None:
    import imageio.v2 as imageio

    true = torch.zeros(2, 6, 3, 8, 8)
    true[..., 0, 0] = torch.arange(6.0).reshape(6, 1) / 6  # a GIF has equal pictures once
    predicted = torch.ones_like(true)
    draw_images(true, predicted, 2, tmp_path / "a.gif")
    frames = np.stack(imageio.mimread(tmp_path / "a.gif"))
    assert frames.shape[:3] == (6, 4 + 3 * 8, 2 * 8)
    assert [frames[0, row, 3, 0] // 100 for row in (8, 16, 24)] == [0, 2, 2]
    assert frames[0, 1, 3, 1] > 200 > frames[5, 1, 3, 1] and frames[5, 1, 3, 0] > 200


def test_predictions_are_refused_without_a_world_model() -> None:
    with pytest.raises(OptionError, match="Predictions: expected DreamerV3, got DQN"):
        quiet_trainer(callbacks=[Predictions()]).fit(DQN(), ReplayDataModule("CartPole-v1", max_env_steps=300))
    data = ReplayDataModule("CartPole-v1", max_env_steps=200, **RUN)
    with pytest.raises(OptionError, match="context=6: expected less than sequence_length=6"):
        quiet_trainer(callbacks=[Predictions(context=6)]).fit(DreamerV3(size="nano", sequence_length=L), data)


def test_actions_that_exploration_chose_are_the_ones_that_are_remembered() -> None:
    policy = make().policy
    policy.epsilon = 1.0
    action, _, state = policy.sample(np.zeros((64, 3), np.float32), policy.initial_state(64))
    np.testing.assert_array_equal(state["action"], np.eye(3)[action])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_it_learns_to_name_what_it_sees_whatever_a_reward_is_worth(scale: float) -> None:
    algorithm = DreamerV3(
        size="nano", sequence_length=8, horizon=2, lr=3e-3, warmup=10, entropy_coef=0.01, return_rate=0.1, gamma=0.9
    )
    data = ReplayDataModule(
        IdentityEnv, max_env_steps=1500, num_envs_per_env_runner=4, learning_starts=128, batch_size=64,
        buffer_size=4000, env_steps_per_batch=500, update_to_data=0.25, seed=0, evaluation=Evaluation(episodes=20),
        reward_scale=scale,
    )  # fmt: skip
    assert greedy_return(algorithm, data) >= 0.9  # at random 0.25


@pytest.mark.slow
def test_it_learns_to_hit_what_it_sees() -> None:
    algorithm = DreamerV3(
        size="nano", sequence_length=8, horizon=2, lr=3e-3, warmup=10, entropy_coef=0.003, return_rate=0.1, gamma=0.9
    )
    data = ReplayDataModule(
        TargetEnv, max_env_steps=2000, num_envs_per_env_runner=4, learning_starts=200, batch_size=64, buffer_size=4000,
        env_steps_per_batch=500, update_to_data=0.25, seed=0, evaluation=Evaluation(episodes=20),
    )  # fmt: skip
    assert greedy_return(algorithm, data) >= -0.2  # random actions -0.67, 0 always -0.33


@pytest.mark.slow
def test_it_predicts_what_comes_of_actions_and_that_a_time_limit_ends_nothing() -> None:
    algorithm = DreamerV3(size="nano", deter=48, sequence_length=20, horizon=2, lr=3e-3, warmup=20)
    data = ReplayDataModule(
        TurningEnv, max_env_steps=1000, num_envs_per_env_runner=4, learning_starts=400, batch_size=160,
        env_steps_per_batch=200, update_to_data=0.8, seed=0,
    )  # fmt: skip
    quiet_trainer(limit_val_batches=0).fit(algorithm, data)
    batch = data.buffer.peek(200, np.random.default_rng(0))
    within = batch[batch["is_first"][:, 1:].sum(1) == 0]  # sequences of one episode
    true, predicted = algorithm.open_loop(within, context=5)[""]
    assert len(within) > 20
    error, of_copies = ((x - true).square().mean((0, 2)).sqrt() for x in (predicted, true[:, 4:5]))
    assert (error[7:] < of_copies[7:]).all()
    assert error[19] < 0.7 * of_copies[19]  # the fifteenth row that it does not see
    algorithm.draw_noise(batch)
    features = algorithm.model.losses(algorithm.policy, batch, gamma=algorithm.gamma, free_bits=1.0)[2]
    chance = torch.sigmoid(algorithm.model.continues(features)).squeeze(-1)
    assert batch["is_last"].any() and chance[batch["is_last"]].mean() > 0.99 * algorithm.gamma


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "tiny"}, "size='tiny': expected one of 'nano', 'micro', 'size1m'"),
        ({"deter": 30, "blocks": 4}, "deter=30: expected a multiple of blocks=4"),
        ({"bins": 64}, "bins=64: expected an odd number"),
        ({"burn_in": 4}, "burn_in=4: expected 0, since the state before a sequence is replayed"),
        (
            {"obs": spaces.Box(0, 255, (64, 64, 3), np.uint8), "depth": 3},
            "depth=3: expected a multiple of 2 for images",
        ),
        ({"network": LSTMNetwork}, "network=LSTMNetwork: expected a network without memory"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("obs", "action", "message"),
    [
        (spaces.Box(0, 255, (60, 64, 3), np.uint8), DISCRETE, "Images of 60 by 64: expected sides that are multiples"),
        (spaces.Box(0, 255, (32, 32, 3), np.uint8), DISCRETE, "of 16 from 48 to 256, such as 64 by 64"),
        (spaces.Box(-np.inf, np.inf, (64, 64, 3)), DISCRETE, "expected images between 0 and a finite bound"),
        (VECTOR, spaces.MultiDiscrete([2, 3]), "needs a Discrete or Box action space, got MultiDiscrete"),
        (VECTOR, spaces.Dict({"a": DISCRETE}), "needs a Discrete or Box action space, got Dict"),
        (VECTOR, spaces.Box(-np.inf, np.inf, (2,)), "has no bounds"),
    ],
)
def test_spaces_that_it_cannot_take_are_refused(obs: spaces.Space, action: spaces.Space, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make(obs, action)


def test_action_masks_are_refused() -> None:
    data = ReplayDataModule(MaskedEnv, env_kwargs={"action_space": DISCRETE}, max_env_steps=200, **RUN)
    with pytest.raises(SpaceError, match="its observations hold an action mask"):
        quiet_trainer().fit(DreamerV3(size="nano", sequence_length=L), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prioritized": True}, "prioritized=True: DreamerV3 draws new rows first"),
        ({"n_step": 3}, "n_step=3: DreamerV3 sums rewards itself, see its lambda_"),
        ({"batch_size": 4}, "batch_size=4: expected at least one sequence, sequence_length=6 rows"),
        ({"buffer_size": 27}, "sequence_length=6: expected sequences that fit into buffer_size=27"),
    ],
)
def test_buffers_that_it_cannot_learn_from_are_refused(options: dict, message: str) -> None:
    data = ReplayDataModule("CartPole-v1", max_env_steps=200, **RUN | options)
    with pytest.raises(OptionError, match=message):
        quiet_trainer().fit(DreamerV3(size="nano", sequence_length=L, horizon=H), data)


def test_recorded_episodes_are_refused(tmp_path: Any) -> None:
    algorithm = DreamerV3(size="nano", sequence_length=L, horizon=H)
    data = ReplayDataModule("CartPole-v1", max_env_steps=200, offline_paths=[str(tmp_path)], **RUN)
    with pytest.raises(OptionError, match="model=DreamerV3: it learns from sequences with the states that its policy"):
        quiet_trainer().fit(algorithm, data)


def test_its_policy_is_no_one_elses() -> None:
    class Own(LatentPolicy):
        def __init__(self, spec: EnvSpec, **options: Any):
            super().__init__(spec, network=options["network"], size=SIZES["nano"])

    with pytest.raises(OptionError, match="expected DreamerV3, which alone trains a world model's policy"):
        quiet_trainer().fit(PPO(policy_class=Own), RolloutDataModule("CartPole-v1", max_env_steps=2048, seed=0))
