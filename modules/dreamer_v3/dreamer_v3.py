"""DreamerV3: learns a model of the world from replayed sequences, and acts in what the model imagines.

Shapes: B sequences, L rows; N = B * L imagined ones, H steps each; D the recurrent state, S latents of K classes,
F = D + S * K features, A numbers of an action, Z bins.
"""

from typing import Annotated, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.learner.laprop import LaProp
from lit_rl.learner.targets import Follower, target_of
from lit_rl.modules.dreamer_v3.behaviour import imagine, policy_loss, replay_value_loss, targets_of, value_loss
from lit_rl.modules.dreamer_v3.world_model import TwoHotHead, WorldModel
from lit_rl.networks import Network
from lit_rl.normalizer import ReturnRange
from lit_rl.off_policy import OffPolicy
from lit_rl.options import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    PositiveFraction,
    TwoOrMore,
    UnitInterval,
)
from lit_rl.policy import LatentPolicy
from lit_rl.schedules import Schedule
from lit_rl.spec import EnvSpec

NAMES = ("deter", "hidden", "stoch", "classes", "units", "depth", "layers", "blocks", "bins")
# The author's of arXiv:2301.04104v2 (configs.yaml), and two small ones of our own.
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(NAMES, numbers))
    for name, numbers in {
        "nano": (32, 16, 4, 4, 16, 2, 1, 1, 63),
        "micro": (48, 32, 8, 4, 32, 4, 1, 1, 63),
        "size1m": (512, 64, 32, 4, 64, 4, 3, 8, 255),
        "size12m": (2048, 256, 32, 16, 256, 16, 3, 8, 255),
        "size25m": (3072, 384, 32, 24, 384, 24, 3, 8, 255),
        "size50m": (4096, 512, 32, 32, 512, 32, 3, 8, 255),
        "size100m": (6144, 768, 32, 48, 768, 48, 3, 8, 255),
        "size200m": (8192, 1024, 32, 64, 1024, 64, 3, 8, 255),
        "size400m": (12288, 1536, 32, 96, 1536, 96, 3, 8, 255),
    }.items()
}
Size = Annotated[str, OneOf(*SIZES)]
TERMS = ("policy/entropy", "value/return_mean", "value/return_scale", "world_model/continue_mean")


class DreamerV3(OffPolicy):
    """A world model, and an actor and a critic that learn in it: Hafner et al. 2023, arXiv:2301.04104v2.

    Where the author's present code (github.com/danijar/dreamerv3, e3f0224) differs from the paper, it is as the code:
    block-diagonal recurrence, RMSNorm, LaProp, a replay value loss, REINFORCE for all actions. docs/dreamer.md names
    each difference.

    Reads sequences [B, L] that go on across the ends of episodes: `observation`, `previous_action` (before it),
    `reward` (received on arriving), `is_first`, `is_last`, `is_terminal`, and `state` [B] before the first row; see
    `SequenceBuffer`. Writes `latents`, which go back to the buffer.

    Args:
        size: of all networks: the author's size1m to size400m, or micro or nano for small tasks.
        deter: numbers of the recurrent state; None takes the size's, here and below.
        hidden: width of the recurrent model's layers.
        stoch: latents.
        classes: of each latent.
        units: width of the encoder, decoder, heads, actor and critic.
        depth: filters of the convolutions for images are multiples of it.
        layers: of encoder, decoder, actor and critic.
        blocks: of the recurrent matrices.
        bins: of the distributions of rewards and values, an odd number.
        lr: LaProp's learning rate.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`.
        warmup: updates in which the learning rate grows from 0.
        agc: bound of each gradient's norm, as a share of its parameter's; None leaves gradients as they are.
        horizon: steps that are imagined from every row.
        lambda_: of lambda-returns.
        entropy_coef: weight of the policy's entropy.
        unimix: share of the uniform distribution in that of each latent and of Discrete actions.
        free_bits: nats of each row's KL divergence that cost nothing.
        dynamics_coef: weight of the KL divergence that moves the prior.
        representation_coef: weight of the KL divergence that moves the posterior.
        replay_value_coef: weight of the critic's loss on replayed rows; 0 leaves it out.
        slow_rate: how far the slow critic moves to the critic after every update.
        return_rate: of the newest returns in the range that advantages are divided by.
        normalize_returns: whether advantages are divided by it.
        gamma: discount per env step.
        sequence_length: rows of each sequence.
        network: callable `(observation_space) -> nn.Module` with an `output_size`, which encodes observations; None for
            the author's. The decoder is always that.
        compile: compile each update as one function, see `CompiledStep`.
    """

    POLICY = LatentPolicy
    REPLAY = {**OffPolicy.REPLAY, "batch_size": 1024, "update_to_data": 0.5, "learning_starts": 1024}
    ACROSS_EPISODES = COMPILES_MEMORY = True

    policy: LatentPolicy

    def __init__(
        self,
        *,
        size: Size = "size1m",
        deter: Count | None = None,
        hidden: Count | None = None,
        stoch: Count | None = None,
        classes: TwoOrMore | None = None,
        units: Count | None = None,
        depth: Count | None = None,
        layers: Count | None = None,
        blocks: Count | None = None,
        bins: TwoOrMore | None = None,
        lr: Positive = 4e-5,
        lr_schedule: Schedule = "constant",
        warmup: CountOrZero = 1000,
        agc: Positive | None = 0.3,
        horizon: Count = 15,
        lambda_: UnitInterval = 0.95,
        entropy_coef: NonNegative = 3e-4,
        unimix: Fraction = 0.01,
        free_bits: NonNegative = 1.0,
        dynamics_coef: NonNegative = 1.0,
        representation_coef: NonNegative = 0.1,
        replay_value_coef: NonNegative = 0.3,
        slow_rate: PositiveFraction = 0.02,
        return_rate: PositiveFraction = 0.01,
        normalize_returns: bool = True,
        gamma: UnitInterval = 1 - 1 / 333,
        sequence_length: TwoOrMore = 64,
        network: Network | None = None,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(gamma=gamma, sequence_length=sequence_length, network=network, **options)
        self.take_options()
        self.lr = self.scheduled("lr")
        if self.hp.burn_in:
            raise OptionError(
                f"burn_in={self.hp.burn_in}: expected 0, since the state before a sequence is replayed. Leave it out."
            )

    @property
    def network_size(self) -> dict[str, int]:
        """The numbers of the networks.

        Raises:
            OptionError: if they do not go together.
        """
        size = SIZES[self.hp.size] | {name: self.hp[name] for name in NAMES if self.hp[name] is not None}
        if size["deter"] % size["blocks"]:
            raise OptionError(f"deter={size['deter']}: expected a multiple of blocks={size['blocks']}.")
        if size["bins"] % 2 == 0:
            raise OptionError(f"bins={size['bins']}: expected an odd number, with 0 in the middle.")
        return size

    def build(self, spec: EnvSpec) -> None:
        size = self.network_size
        self.policy = self.make_policy(spec, size=size, unimix=self.hp.unimix)  # type: ignore[assignment]
        self.model = WorldModel(self.policy, size)
        num_features = self.policy.encoder.output_size
        self.critic = TwoHotHead(num_features, units=size["units"], layers=size["layers"], bins=size["bins"])
        self.slow_critic = target_of(self.critic)
        self.returns_range = ReturnRange(self.hp.return_rate)
        self.follow = Follower(self.slow_critic, self.critic)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [*self.policy.parameters(), *self.model.parameters(), *self.critic.parameters()]
        return LaProp(parameters, lr=self.hp.lr, agc=self.hp.agc, warmup=self.hp.warmup)

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses in their sum."""
        hp = self.hp
        return {
            "dynamics": hp.dynamics_coef,
            "representation": hp.representation_coef,
            "observation": 1.0,
            "reward": 1.0,
            "continue": 1.0,
            "policy": 1.0,
            "value": 1.0,
            "replay_value": hp.replay_value_coef,
        }

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        self.draw_noise(batch)
        taken, (latents, limits, terms) = self.gradient_step(batch)
        if taken is not False:
            kept = self.returns_range.limits
            kept.copy_(torch.where(taken, limits, kept) if isinstance(taken, Tensor) else limits)
            batch["latents"] = latents
        self.follow(self.hp.slow_rate, taken)
        return dict(zip((*(f"loss/{name}" for name in self.weights), *TERMS), terms.unbind()))

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor, Tensor]]:
        """The sum of all losses; the posterior's latents, the range of returns after these, and what is logged."""
        hp, policy, critic, slow, weights = self.hp, self.policy, self.critic, self.slow_critic, self.weights

        # The world model, on what was replayed.
        losses, latents, features = self.model.losses(policy, batch, gamma=hp.gamma, free_bits=hp.free_bits)
        assert all(loss.shape == batch["reward"].shape for loss in losses.values())  # [B, L]

        # Actor and critic, on what is imagined from every row.
        starts = (latents["deter"], latents["stoch"], batch["latent_noise"], batch["action_noise"])
        imagined = imagine(policy, self.model, *(x.flatten(0, 1) for x in starts))
        log_probs = critic(imagined.features)  # [H + 1, N, Z + 1]
        value = critic.mean(log_probs.detach())
        targets = targets_of(imagined, value, self.returns_range, lambda_=hp.lambda_, normalize=hp.normalize_returns)
        losses["policy"], entropy = policy_loss(policy, imagined, targets, entropy_coef=hp.entropy_coef)
        losses["value"] = targets.weight * value_loss(
            critic, slow, log_probs[:-1], imagined.features[:-1], targets.returns
        )
        assert losses["policy"].shape == losses["value"].shape == targets.returns.shape  # [H, N]

        # The critic, on what was replayed.
        bootstrap = targets.returns[0].view_as(batch["reward"])
        losses["replay_value"] = replay_value_loss(
            critic, slow, features, batch, bootstrap, gamma=hp.gamma, lambda_=hp.lambda_
        )

        assert losses.keys() == weights.keys()
        means = {name: losses[name].mean() for name in weights}
        loss = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
        others = [entropy.mean(), targets.returns.mean(), targets.scale, imagined.discount.mean() / hp.gamma]
        return loss, (latents, targets.limits, torch.stack([*means.values(), *others]).detach())

    @torch.no_grad()
    def open_loop(self, batch: TensorDict, context: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What sequences [B, L] show, by path, and what the world model predicts of that, [B, L, ...] each.

        It sees the first `context` rows, and from then on the actions alone. Random numbers are always the same.
        """
        policy, rssm, state = self.policy, self.policy.encoder.rssm, batch["state"]
        obs, action = policy.inputs(batch["observation"]), policy.as_numbers(batch["previous_action"])
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(*action.shape[:2], rssm.stoch, generator=generator).to(action.device)
        seen = (x[:, :context] for x in (policy.encoder.encoder(obs), action, batch["is_first"], noise))
        tokens, before, is_first, uniform = seen
        deter, stoch, _ = rssm.observe(tokens, before, is_first, state["deter"], state["stoch"], uniform)
        deters, stochs = list(deter.unbind(1)), list(stoch.unbind(1))
        for t in range(context, action.shape[1]):
            deters.append(rssm.step(deters[-1], stochs[-1], rssm.embed(action[:, t])))
            stochs.append(rssm.sample(rssm.prior(deters[-1]), noise[:, t]))
        return self.model.compare(torch.stack(deters, 1), torch.stack(stochs, 1), obs)

    def draw_noise(self, batch: TensorDict) -> None:
        """Add what samples are made of, so that the loss is a function of the batch alone.

        `posterior_noise` [B, L, S], `latent_noise` [B, L, H, S] and, for Discrete actions, `action_noise` [B, L, H, 1],
        for others [B, L, H, A].
        """
        rows, horizon = tuple(batch["reward"].shape), self.hp.horizon
        stoch, device = self.policy.encoder.rssm.stoch, batch["reward"].device
        noise = {
            "posterior_noise": torch.rand(*rows, stoch, generator=self.generator),
            "latent_noise": torch.rand(*rows, horizon, stoch, generator=self.generator),
        }
        if self.policy.is_discrete:
            noise["action_noise"] = torch.rand(*rows, horizon, 1, generator=self.generator)
        else:
            size = self.policy.encoder.num_actions
            noise["action_noise"] = torch.randn(*rows, horizon, size, generator=self.generator)
        for name, numbers in noise.items():
            batch[name] = numbers.to(device, non_blocking=True)
