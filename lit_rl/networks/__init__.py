"""Networks chosen from an observation space: vectors, images, parts of several kinds, memory."""

from lit_rl.networks.build import (
    NETWORKS,
    Network,
    NetworkFactory,
    as_input,
    build_network,
    check_nameable,
    check_same_in_training,
    default_network,
    describe_network,
    has_memory,
    named_network,
    output_size,
)
from lit_rl.networks.cnn import ImpalaResNet, NatureCNN
from lit_rl.networks.critics import CentralCritic, ValueHead, ValueNetwork
from lit_rl.networks.mlp import MLP, MultiInput, orthogonal
from lit_rl.networks.recurrent import GRUNetwork, LSTMNetwork, reset_rows, unroll

__all__ = [
    "MLP",
    "NETWORKS",
    "CentralCritic",
    "GRUNetwork",
    "ImpalaResNet",
    "LSTMNetwork",
    "MultiInput",
    "NatureCNN",
    "Network",
    "NetworkFactory",
    "ValueHead",
    "ValueNetwork",
    "as_input",
    "build_network",
    "check_nameable",
    "check_same_in_training",
    "default_network",
    "describe_network",
    "has_memory",
    "named_network",
    "orthogonal",
    "output_size",
    "reset_rows",
    "unroll",
]
