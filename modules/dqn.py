"""Deep Q-networks, and Rainbow: all that made them better.

Shapes: *N rows, [M] or sequences [S, L]; F features, A actions, Z atoms or quantiles of an action's value, else 1.
"""

import functools
from typing import Annotated, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.learner.refusals import check_memory
from lit_rl.learner.targets import Follower, target_of
from lit_rl.losses import categorical_td_loss, project, quantile_huber_loss, td_loss
from lit_rl.networks import MLP, NetworkFactory, check_same_in_training
from lit_rl.networks.q import set_noise
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count, Counts, OneOf, Positive, PositiveFraction, TwoOrMore, UnitInterval
from lit_rl.policy import Policy
from lit_rl.policy.q import DISTRIBUTIONAL, QPolicy
from lit_rl.rollout import means_of_rows
from lit_rl.schedules import Schedule, Scheduled, UnitSchedule
from lit_rl.spec import EnvSpec, has_images
from lit_rl.transitions import (
    action_difference,
    bootstrap_observation,
    features,
    greedy_actions,
    judged,
    next_features,
    of_action,
    set_priority,
    weighted_mean,
)

EPSILON = [[0, 1.0], [10_000, 0.05]]  # its schedule where neither it nor one is set
Loss = Annotated[str, OneOf("huber", "mse")]
Distributional = Annotated[str | None, OneOf(*DISTRIBUTIONAL)]


class DQN(OffPolicy):
    """Deep Q-network: Mnih et al. 2015, doi:10.1038/nature14236, algorithm 1, with the parts of Rainbow as options.

    Rainbow (Hessel et al. 2018, arXiv:1710.02298) has six: double Q-learning (`double`), dueling networks (`dueling`),
    distributions of returns (`distributional`) and noisy networks (`noisy`) are options here; summed rewards (`n_step`)
    and prioritised replay (`prioritized`) are options of the `ReplayDataModule`.

    Deviations from the paper, which keep small tasks stable: Adam instead of RMSProp, the squared error, a target
    network that follows softly at every gradient update instead of being copied after many env steps, layer
    normalisation, and three summed rewards.

    Reads minibatches [M] of `observation, action, discount` and `("next", "observation" | "reward" | "terminated")`,
    with `weight` if the replay is prioritised, to which it then adds `priority`; with memory sequences [S, L]: see
    `ReplayBuffer.sample_sequences`.

    Args:
        lr: Adam's learning rate; usually 1e-4 to 1e-3.
        lr_schedule: "constant"; "linear" or "cosine", to 0 at the datamodule's `max_env_steps`; or points
            `[[env_step, lr], ...]`, which replace `lr`.
        adam_eps: what Adam adds to the root of the squared gradient; Rainbow's paper has 1.5e-4.
        epsilon: probability of a random action while training. None: 0 with `noisy`, which explores by itself; else 1
            to 0.05 over 10,000 env steps, or from 1 as `epsilon_schedule` says.
        epsilon_schedule: of `epsilon`, as `lr_schedule` is of `lr`.
        target_update_interval: gradient updates between those of the target network; the paper's 10,000 with `tau=1`.
        tau: how far the target network then moves to the network: 1 copies it, 0.01 follows it slowly.
        loss: "mse" or "huber", of the TD error; unused with `distributional`. "huber" suits rewards that are clipped to
            ±1: of errors above 1 it fits the median, and misses ends of episodes that are rare.
        double: choose the next action by the network, value it by the target network: van Hasselt et al. 2016,
            arXiv:1509.06461.
        dueling: separate streams for the state's value and the actions' advantages: Wang et al. 2016, arXiv:1511.06581.
        distributional: "categorical" learns the distribution of returns over fixed atoms (C51: Bellemare et al. 2017,
            arXiv:1707.06887), "quantile" its quantiles (QR-DQN: Dabney et al. 2018, arXiv:1710.10044).
        num_atoms: atoms or quantiles.
        v_min: the lowest of the "categorical" atoms: a lower bound of the discounted return.
        v_max: the greatest of them: an upper bound.
        noisy: explore by noise on the head's weights: Fortunato et al. 2018, arXiv:1706.10295.
        sigma0: of that noise, when training begins: the sigmas are sigma0 / sqrt(inputs).
        head_hidden_sizes: layers (with ReLU) of the head, or of each of its streams, after the network.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None is two hidden layers of 128
            ReLU units with layer normalisation, or the default network for images.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.
    """

    POLICY: type[Policy] = QPolicy
    REPLAY = {**OffPolicy.REPLAY, "batch_size": 128, "update_to_data": 0.125, "n_step": 3}
    TERMS: tuple[str, ...] = ("loss/value", "value/td_error", "value/q_mean")

    policy: QPolicy
    target: QPolicy

    def __init__(
        self,
        *,
        lr: Positive = 1e-3,
        lr_schedule: Schedule = "constant",
        adam_eps: Positive = 1e-8,
        epsilon: UnitInterval | None = None,
        epsilon_schedule: UnitSchedule = "constant",
        target_update_interval: Count = 1,
        tau: PositiveFraction = 0.01,
        loss: Loss = "mse",
        double: bool = True,
        dueling: bool = False,
        distributional: Distributional = None,
        num_atoms: TwoOrMore = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        noisy: bool = False,
        sigma0: Positive = 0.5,
        head_hidden_sizes: Counts = (),
        max_grad_norm: Positive | None = None,
        compile: bool = False,
        **options: Any,
    ):
        super().__init__(max_grad_norm=max_grad_norm, **options)
        self.take_options()
        if v_min >= v_max:
            raise OptionError(f"v_min={v_min}: expected less than v_max={v_max}.")
        self.lr = self.scheduled("lr")
        if epsilon is None:
            epsilon = 0.0 if noisy else 1.0
            epsilon_schedule = EPSILON if epsilon_schedule == "constant" and not noisy else epsilon_schedule
        self.epsilon = Scheduled("epsilon", epsilon, epsilon_schedule)

    def default_network(self, spec: EnvSpec) -> NetworkFactory | None:
        if has_images(spec.observation_space):
            return None
        return functools.partial(MLP, hidden_sizes=[128, 128], activation="relu", layer_norm=True)

    def build(self, spec: EnvSpec) -> None:
        hp = self.hp
        policy = self.make_policy(
            spec,
            dueling=hp.dueling,
            noisy=hp.sigma0 if hp.noisy else None,
            distributional=hp.distributional,
            num_atoms=hp.num_atoms,
            v_min=hp.v_min,
            v_max=hp.v_max,
            hidden_sizes=hp.head_hidden_sizes,
        )
        assert isinstance(policy, QPolicy)
        check_same_in_training(policy)
        self.policy, self.target = policy, target_of(policy)
        self.follow = Follower(self.target, policy)
        check_memory(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.policy.parameters(), lr=self.hp.lr, eps=self.hp.adam_eps, fused=True)

    def epsilon_at(self, env_steps: int) -> float:
        return self.epsilon.at(env_steps, self.budget)

    def learned(self) -> dict[str, Tensor | float]:
        return {**super().learned(), "policy/epsilon": self.epsilon_at(self.env_steps_done)}

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        hp = self.hp
        if hp.noisy:
            set_noise(self.policy, self.generator)
            set_noise(self.target, self.generator)
        taken, (td_error, terms) = self.gradient_step(batch)
        set_priority(batch, td_error)
        if (self.updates_done + 1) % hp.target_update_interval == 0:
            self.follow(hp.tau, taken)
        return dict(zip(self.TERMS, terms.unbind()))

    @torch.no_grad()
    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        policy, obs = self.policy, batch["observation"]
        for network in (policy, self.target):
            set_noise(network, None)
        _, (td_error, _) = self.loss(batch)
        feature = policy.features(batch)
        value = policy.rule_out(policy.expectation(policy.distributions(feature)), obs).amax(-1)
        chosen = greedy_actions(policy, feature, obs)
        return judged(
            batch,
            td_error=td_error.abs(),
            initial_value=value,
            action_difference=action_difference(policy, chosen, batch["action"]),
        )

    def loss(self, batch: TensorDict) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a minibatch, each row's TD error [*N], and the means named by `TERMS`."""
        if self.hp.double:
            feature, next_feature = features(self.policy, batch)
        else:
            feature, next_feature = self.policy.features(batch), None
        outputs = self.policy.distributions(feature)  # [*N, A, Z]
        with torch.no_grad():
            next_outputs = self.next_outputs(batch, next_feature)  # [*N, Z]
        output = of_action(outputs, batch["action"])
        assert output.shape == next_outputs.shape == (*batch["next", "reward"].shape, outputs.shape[-1])
        loss, td_error = self.losses(batch, output, next_outputs)
        assert loss.shape == td_error.shape == output.shape[:-1]
        with torch.no_grad():
            q = self.policy.expectation(output.unsqueeze(-2)).squeeze(-1)
            terms = means_of_rows(batch, loss, td_error.abs(), q)
        return weighted_mean(loss, batch), (td_error, terms)

    def next_outputs(self, batch: TensorDict, online: Tensor | None) -> Tensor:
        """What the target network says of the best legal next action, [*N, Z].

        The best by the network itself, whose features of the next observations are `online` (double Q-learning), or
        else by the target network.
        """
        target = self.target
        outputs = target.distributions(next_features(target, batch))
        if online is None:
            q = target.expectation(outputs)
        else:
            q = self.policy.expectation(self.policy.distributions(online))
        return of_action(outputs, target.rule_out(q, bootstrap_observation(batch)).argmax(-1))

    def losses(self, batch: TensorDict, output: Tensor, next_output: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row and its TD error, [*N]; `output` and `next_output` are the actions' own, [*N, Z]."""
        reward, discount = batch["next", "reward"], batch["discount"] * ~batch["next", "terminated"]
        if self.hp.distributional == "categorical":
            support, size = self.policy.head.support, output.shape[-1]
            assert isinstance(support, Tensor)
            probability = next_output.softmax(-1).reshape(-1, size)
            target = project(probability, support, reward.flatten(), discount.flatten()).view_as(output)
            loss = categorical_td_loss(output, target)
            return loss, loss.detach() - torch.special.entr(target).sum(-1)  # KL divergence: Rainbow's priority
        target = reward.unsqueeze(-1) + discount.unsqueeze(-1) * next_output
        td_error = (target - output.detach()).mean(-1)
        if self.hp.distributional == "quantile":
            return quantile_huber_loss(output, target), td_error
        return td_loss(output.squeeze(-1), target.squeeze(-1), self.hp.loss), td_error


class Rainbow(DQN):
    """DQN with all six parts on: Hessel et al. 2018, arXiv:1710.02298.

    The `ReplayDataModule` draws by priority unless it is told otherwise. Deviations from the paper:
    those of `DQN`, and smaller defaults than Atari's, where the paper has `lr=6.25e-5`, `adam_eps=1.5e-4`,
    `head_hidden_sizes=[512]`.

    Set `v_min` and `v_max` to the least and the greatest discounted return there can be.
    """

    REPLAY = {**DQN.REPLAY, "prioritized": True}

    def __init__(
        self,
        *,
        dueling: bool = True,
        distributional: Distributional = "categorical",
        noisy: bool = True,
        **options: Any,
    ):
        super().__init__(dueling=dueling, distributional=distributional, noisy=noisy, **options)
