"""What off-policy algorithms are given as one Lightning batch."""

from collections.abc import Callable, Iterator

from tensordict import TensorDict


class ReplayStream:
    """One Lightning batch of off-policy algorithms: minibatches, drawn while the env runners go on stepping.

    Iterating it steps environments and yields minibatches in turn, in the proportion the datamodule was told. What
    `update` writes into a minibatch's `priority` goes back to the buffer before the next one is drawn.

    Args:
        minibatches: given this object, steps environments and yields minibatches, each after its policy's id.

    Attributes:
        waited_s: seconds the learner waited for env steps.
        env_steps: that it brought so far, over all ranks.
    """

    def __init__(self, minibatches: Callable[["ReplayStream"], Iterator[tuple[str, TensorDict]]]):
        self._minibatches = minibatches
        self.waited_s = 0.0
        self.env_steps = 0
        self._counted = 0

    def __iter__(self) -> Iterator[TensorDict]:
        for _, minibatch in self._minibatches(self):
            yield minibatch

    def by_policy(self) -> Iterator[tuple[str, TensorDict]]:
        """The same, each minibatch after the id of the policy that it is for."""
        return self._minibatches(self)

    def take_env_steps(self) -> int:
        """How many env steps it brought since this was asked last."""
        new, self._counted = self.env_steps - self._counted, self.env_steps
        return new
