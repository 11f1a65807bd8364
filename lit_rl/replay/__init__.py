"""Experience replay: the buffer, and the stream of minibatches drawn from it."""

from lit_rl.replay.buffer import ReplayBuffer
from lit_rl.replay.stream import ReplayStream

__all__ = ["ReplayBuffer", "ReplayStream"]
