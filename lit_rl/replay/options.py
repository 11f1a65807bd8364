"""The options of a replay buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from lit_rl.errors import OptionError
from lit_rl.options import (
    Count,
    Folder,
    Limit,
    OptionFields,
    Positive,
    UnitInterval,
    check,
    check_fields,
)


class _Steps(Limit):
    """A whole number of steps, or the least and the most of them."""

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return check(name, value, Count)
        if len(value) != 2 or check(name, value[0], Count) > check(name, value[1], Count):
            raise OptionError(f"{name}={value!r}: expected {self!r}.")
        return tuple(int(number) for number in value)

    def __repr__(self) -> str:
        return "a whole number, or [low, high]"


Steps = Annotated[int | Sequence[int], _Steps()]


@dataclass(frozen=True)
class Replay(OptionFields):
    """How large a replay buffer is, what is drawn from it, and how often an algorithm learns from it.

    Attributes:
        buffer_size: rows of the buffer, of each learner process. A transition takes one row, and the final observation
            of each episode another.
        batch_size: transitions per gradient update and learner process. With memory they come as `batch_size /
            sequence_length` sequences. None takes the algorithm's own: 128 for DQN, 256 for SAC, 1,024
            for DreamerV3.
        learning_starts: env steps, over all learner processes, before the first update. None takes the algorithm's
            own: 256, or 1,024 for DreamerV3.
        random_warmup: whether actions are random until then, instead of the policy's.
        update_to_data: gradient updates per env step of a learner process; 0.25 is one for every four. None takes the
            algorithm's own: 0.125 for DQN, 1 for SAC, 0.5 for DreamerV3.
        n_step: rewards summed before bootstrapping; `[low, high]` draws the number anew for each transition. None takes
            the algorithm's own: 3 for DQN and Rainbow, 1 for SAC.
        prioritized: draw surprising transitions more often: Schaul et al. 2016, arXiv:1511.05952. None takes the
            algorithm's own: False, or True for Rainbow.
        priority_alpha: 0 draws uniformly, 1 in proportion to the TD errors.
        priority_beta: exponent of the importance weights when training begins. It grows linearly to 1, which makes up
            for the priorities in full, at `max_env_steps`; without `max_env_steps` it stays.
        storage_dir: folder for memory-mapped files of observations and actions; None keeps them in memory. They are
            removed with the datamodule, at the latest when the program ends.
        checkpoint_buffer: whether checkpoints hold the buffer, in a folder `<checkpoint>.d` beside the file, and
            whether a resumed run takes it from there; else that begins with an empty buffer.
    """

    buffer_size: Count = 100_000
    batch_size: Count | None = None
    learning_starts: Count | None = None
    random_warmup: bool = True
    update_to_data: Positive | None = None
    n_step: Steps | None = None
    prioritized: bool | None = None
    priority_alpha: UnitInterval = 0.6
    priority_beta: UnitInterval = 0.4
    storage_dir: Folder | None = None
    checkpoint_buffer: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        batch_size = self.batch_size
        if batch_size is None:
            return
        if batch_size > self.buffer_size:
            raise OptionError(f"buffer_size={self.buffer_size}: expected at least batch_size={batch_size}. Raise it.")
        if self.learning_starts is not None and batch_size > self.learning_starts:
            raise OptionError(
                f"learning_starts={self.learning_starts}: expected at least batch_size={batch_size} env steps. Raise "
                "it."
            )

    def completed(self, defaults: Mapping[str, Any]) -> "CompleteReplay":
        """With an algorithm's defaults, its `OffPolicy.REPLAY`, where nothing is set.

        Raises:
            OptionError: if they do not go together with what is set.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return CompleteReplay(**given | {name: value for name, value in defaults.items() if given[name] is None})


class _Replays(Limit):
    """Options of replay buffers: the same for all policies, or by policy."""

    def accepts(self, value: Any) -> bool:
        of_each = value.values() if isinstance(value, Mapping) else [value]
        return all(isinstance(replay, Replay) for replay in of_each)

    def __repr__(self) -> str:
        return "Replay(...), or a dict of them by policy"


Replays = Annotated[Replay | dict[str, Replay], _Replays()]


@dataclass(frozen=True, kw_only=True)
class CompleteReplay(Replay):
    """A `Replay` that leaves nothing to the algorithm."""

    batch_size: Count
    learning_starts: Count
    update_to_data: Positive
    n_step: Steps
    prioritized: bool

    @property
    def num_steps(self) -> tuple[int, int]:
        """`n_step` as the least and the most number of steps."""
        low, high = (self.n_step, self.n_step) if isinstance(self.n_step, int) else self.n_step
        return low, high
