"""Deep Q-networks, and Rainbow: all that made them better."""

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.checks import check_choice, check_count, check_counts, check_flag, check_range
from lit_rl.distributed import row_means
from lit_rl.errors import OptionError
from lit_rl.losses import categorical_td_loss, project, quantile_huber_loss, td_loss
from lit_rl.networks import NetworkFactory, check_same_in_training
from lit_rl.networks.q import set_noise
from lit_rl.off_policy import (
    Follower,
    OffPolicy,
    features,
    next_features,
    next_observation,
    of_action,
    set_priority,
    target_of,
    weighted_mean,
)
from lit_rl.policy import Policy
from lit_rl.q_policy import DISTRIBUTIONAL, QPolicy
from lit_rl.rollout import mask_of
from lit_rl.schedules import Schedule, check_points, check_schedule, value_at
from lit_rl.spec import EnvSpec

EPSILON = [[0, 1.0], [10_000, 0.05]]  # where it is not set
TERMS = ("loss/value", "value/td_error", "value/q_mean")


class DQN(OffPolicy):
    """Deep Q-network: Mnih et al. 2015, doi:10.1038/nature14236, algorithm 1, with the parts of Rainbow as options.

    Rainbow (Hessel et al. 2018, arXiv:1710.02298) has six: double Q-learning (`double`), dueling networks (`dueling`),
    distributions of returns (`distributional`) and noisy networks (`noisy`) are options here; summed rewards (`n_step`)
    and prioritised replay (`prioritized`) are options of the `ReplayDataModule`.

    Deviations from the paper: Adam instead of RMSProp, the Huber loss instead of clipped gradients of the error, and
    the target network follows by gradient updates, not env steps.

    Reads minibatches [M] of `observation, action, discount` and `("next", "observation" | "reward" | "terminated")`,
    with `weight` if the replay is prioritised, to which it then adds `priority`; with memory sequences [S, L]: see
    `ReplayBuffer.sample_sequences`.

    Args:
        lr: Adam's learning rate; usually 1e-4 to 1e-3.
        lr_schedule: "constant", "linear" (to 0 at the datamodule's `max_env_steps`), or points
            `[[env_step, lr], ...]`, which replace `lr`.
        gamma: discount per env step; 0.9 to 0.999.
        epsilon: probability of a random action while training: a number, or points `[[env_step, value], ...]`. None: 1
            to 0.05 over 10,000 env steps, or 0 with `noisy`, which explores by itself.
        target_update_interval: gradient updates between those of the target network.
        tau: how far the target network then moves to the network: 1 copies it, 0.005 follows it slowly.
        loss: "huber" or "mse", of the TD error; unused with `distributional`.
        double: choose the next action by the network, value it by the target network: van Hasselt et al. 2016,
            arXiv:1509.06461.
        dueling: separate streams for the state's value and the actions' advantages: Wang et al. 2016, arXiv:1511.06581.
        distributional: "categorical" learns the distribution of returns over fixed atoms (C51: Bellemare et al. 2017,
            arXiv:1707.06887), "quantile" its quantiles (QR-DQN: Dabney et al. 2018, arXiv:1710.10044).
        num_atoms: atoms or quantiles.
        v_min, v_max: the lowest and the greatest atom: bounds of the discounted return.
        noisy: explore by noise on the head's weights: Fortunato et al. 2018, arXiv:1706.10295.
        sigma0: of that noise, when training begins.
        head_hidden_sizes: layers (with ReLU) of the head, or of each of its streams, after the network.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        network: callable `(observation_space) -> nn.Module` with an `output_size`; None for the default of the space
            (two hidden layers of 64 tanh units for a vector).
        sequence_length: steps of each sequence that a network with memory is trained on.
        burn_in: steps before each sequence that refresh the memory first, without gradients.
        compile: compile each gradient step as one function, see `CompiledStep`: for runs long enough to pay for
            ten seconds to a minute of compilation.
        policy_class: a subclass of `QPolicy` that chooses actions in its own way.
        spec: the environment's spaces in plain data; None takes the datamodule's.
    """

    POLICY: type[Policy] = QPolicy

    policy: QPolicy
    target: QPolicy

    def __init__(
        self,
        *,
        lr: float = 5e-4,
        lr_schedule: Schedule = "constant",
        gamma: float = 0.99,
        epsilon: float | Sequence[Sequence[float]] | None = None,
        target_update_interval: int = 500,
        tau: float = 1.0,
        loss: str = "huber",
        double: bool = True,
        dueling: bool = False,
        distributional: str | None = None,
        num_atoms: int = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        noisy: bool = False,
        sigma0: float = 0.5,
        head_hidden_sizes: Sequence[int] = (),
        max_grad_norm: float | None = 10.0,
        network: NetworkFactory | dict[str, Any] | None = None,
        sequence_length: int = 20,
        burn_in: int = 0,
        compile: bool = False,
        policy_class: type[QPolicy] | None = None,
        spec: dict[str, Any] | None = None,
    ):
        if max_grad_norm is not None:
            max_grad_norm = check_range("max_grad_norm", max_grad_norm, 0.0, exclusive_low=True)
        super().__init__(
            network=network, policy_class=policy_class, spec=spec, max_grad_norm=max_grad_norm, compile=compile
        )
        lr = check_range("lr", lr, 0.0, exclusive_low=True)
        lr_schedule = check_schedule("lr_schedule", lr_schedule)
        gamma = check_range("gamma", gamma, 0.0, 1.0)
        if epsilon is not None:
            epsilon = check_points("epsilon", epsilon, 1.0)
        target_update_interval = check_count("target_update_interval", target_update_interval)
        tau = check_range("tau", tau, 0.0, 1.0, exclusive_low=True)
        check_choice("loss", loss, ("huber", "mse"))
        for name, flag in (("double", double), ("dueling", dueling), ("noisy", noisy)):
            check_flag(name, flag)
        if distributional not in DISTRIBUTIONAL:
            raise OptionError(f"distributional={distributional!r}: expected None, 'categorical' or 'quantile'.")
        num_atoms = check_count("num_atoms", num_atoms, 2)
        v_min, v_max = check_range("v_min", v_min), check_range("v_max", v_max)
        if v_min >= v_max:
            raise OptionError(f"v_min={v_min}: expected less than v_max={v_max}.")
        sigma0 = check_range("sigma0", sigma0, 0.0, exclusive_low=True)
        head_hidden_sizes = check_counts("head_hidden_sizes", head_hidden_sizes)
        sequence_length = check_count("sequence_length", sequence_length, 2)
        burn_in = check_count("burn_in", burn_in, 0)
        self.save_hyperparameters(ignore=["network", "policy_class", "spec"])

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
        self.check_memory()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.policy.parameters(), lr=self.hp.lr, fused=True)

    def lr_at(self, env_steps: int) -> float:
        return self.schedule("lr_schedule", self.hp.lr, self.hp.lr_schedule, env_steps)

    def epsilon_at(self, env_steps: int) -> float:
        epsilon = self.hp.epsilon
        if epsilon is None:
            epsilon = 0.0 if self.hp.noisy else EPSILON
        return value_at("epsilon", epsilon, env_steps)

    def learn(self, batch: Any) -> dict[str, Tensor | float]:
        metrics = super().learn(batch)
        return {**metrics, "policy/epsilon": self.epsilon_at(self.env_steps_done)}

    def update(self, batch: TensorDict) -> dict[str, Tensor | float]:
        hp = self.hp
        if hp.noisy:
            set_noise(self.policy, self.generator)
            set_noise(self.target, self.generator)
        taken, (td_error, terms) = self.gradient_step(batch)
        set_priority(batch, td_error)
        if taken and (self.updates_done + 1) % hp.target_update_interval == 0:
            self.follow(hp.tau)
        return dict(zip(TERMS, terms.unbind()))

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
        loss, td_error = self.losses(batch, output, next_outputs)
        with torch.no_grad():
            q = self.policy.expectation(output.unsqueeze(-2)).squeeze(-1)
            terms = row_means(mask_of(batch), loss, td_error.abs(), q)
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
        return of_action(outputs, target.rule_out(q, next_observation(batch)).argmax(-1))

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

    The `ReplayDataModule` sums 3 rewards and draws by priority unless it is told otherwise. Deviations from the paper:
    those of `DQN`, and smaller defaults than Atari's, where the paper has `lr=6.25e-5`, `head_hidden_sizes=[512]`.

    Args:
        epsilon: see `DQN`; 0 by default, since noisy layers explore.
        v_min, v_max: set them to the least and the greatest discounted return there can be.
        lr, lr_schedule, gamma, target_update_interval, tau, loss: see `DQN`, as for all others.
    """

    NUM_STEPS, PRIORITIZED = 3, True

    def __init__(
        self,
        *,
        lr: float = 5e-4,
        lr_schedule: Schedule = "constant",
        gamma: float = 0.99,
        epsilon: float | Sequence[Sequence[float]] | None = None,
        target_update_interval: int = 500,
        tau: float = 1.0,
        double: bool = True,
        dueling: bool = True,
        distributional: str | None = "categorical",
        num_atoms: int = 51,
        v_min: float = -10.0,
        v_max: float = 10.0,
        noisy: bool = True,
        sigma0: float = 0.5,
        head_hidden_sizes: Sequence[int] = (),
        max_grad_norm: float | None = 10.0,
        network: NetworkFactory | dict[str, Any] | None = None,
        sequence_length: int = 20,
        burn_in: int = 0,
        compile: bool = False,
        policy_class: type[QPolicy] | None = None,
        spec: dict[str, Any] | None = None,
    ):
        super().__init__(
            lr=lr,
            lr_schedule=lr_schedule,
            gamma=gamma,
            epsilon=epsilon,
            target_update_interval=target_update_interval,
            tau=tau,
            double=double,
            dueling=dueling,
            distributional=distributional,
            num_atoms=num_atoms,
            v_min=v_min,
            v_max=v_max,
            noisy=noisy,
            sigma0=sigma0,
            head_hidden_sizes=head_hidden_sizes,
            max_grad_norm=max_grad_norm,
            network=network,
            sequence_length=sequence_length,
            burn_in=burn_in,
            compile=compile,
            policy_class=policy_class,
            spec=spec,
        )
