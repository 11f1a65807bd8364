"""Target networks: parameters follow slowly, buffers are copied."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lit_rl import DQN, ReplayDataModule
from lit_rl.learner.targets import Follower, target_of
from lit_rl.networks.inputs import FlatInput


class Normed(nn.Module):
    """A network whose spectral norm is estimated in buffers, and which counts the observations it has seen."""

    def __init__(self, space):
        super().__init__()
        self.flat, self.output_size = FlatInput(space), 8
        self.layer = spectral_norm(nn.Linear(self.flat.output_size, 8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, obs):
        if self.training:
            self.seen += 1
        return torch.relu(self.layer(self.flat(obs)))


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_parameters_move_by_tau_and_buffers_are_copied(tau: float) -> None:
    network = nn.BatchNorm1d(2)
    target = target_of(network)
    follow = Follower(target, network)
    network.double()  # as a move to another device: the buffers are other tensors now
    target.double()
    with torch.no_grad():
        network.weight.fill_(3.0)
        network.running_mean.fill_(5.0)
        network.num_batches_tracked.fill_(7)
    follow(tau)
    assert target.weight.tolist() == [1 + 2 * tau] * 2
    assert target.running_mean.tolist() == [5.0] * 2 and target.num_batches_tracked == 7


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_target_follows_after_steps_that_were_taken_alone(tau: float, on_device: bool) -> None:
    network = nn.BatchNorm1d(2)
    target = target_of(network)
    follow = Follower(target, network)
    with torch.no_grad():
        network.weight.fill_(3.0)
        network.running_mean.fill_(5.0)
    follow(tau, torch.tensor(False) if on_device else False)
    assert target.weight.tolist() == [1.0] * 2 and target.running_mean.tolist() == [0.0] * 2
    follow(tau, torch.tensor(True) if on_device else True)
    assert target.weight.tolist() == [1 + 2 * tau] * 2 and target.running_mean.tolist() == [5.0] * 2


def test_a_network_without_buffers_follows() -> None:
    network = nn.Linear(1, 1)
    target = target_of(network)
    with torch.no_grad():
        network.weight.add_(2.0)
    before = float(target.weight)
    Follower(target, network)(0.5)
    assert float(target.weight.detach()) == pytest.approx(before + 1)


def test_the_copy_of_a_network_with_spectral_norm_gives_what_it_gives(make_trainer) -> None:
    algorithm = DQN(network=Normed, tau=1.0, lr=1e-2)
    data = ReplayDataModule(
        "CartPole-v1", max_env_steps=120, learning_starts=20, batch_size=16, buffer_size=200, env_steps_per_batch=60,
        batches_per_epoch=1, seed=0,
    )  # fmt: skip
    make_trainer(limit_val_batches=0).fit(algorithm, data)
    obs = torch.randn(100, 4)
    policy, target = algorithm.policy.eval(), algorithm.target.eval()
    assert policy.encoder.seen > 0 and policy.encoder.seen == target.encoder.seen
    torch.testing.assert_close(policy(obs), target(obs))
