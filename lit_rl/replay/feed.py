"""What feeds off-policy algorithms: for each a replay buffer, and minibatches in proportion to the rows that come."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl import distributed
from lit_rl.errors import OptionError
from lit_rl.off_policy import OffPolicy
from lit_rl.replay.buffer import ReplayBuffer
from lit_rl.replay.options import CompleteReplay, Replay
from lit_rl.replay.sequences import SequenceBuffer
from lit_rl.replay.stream import ReplayStream
from lit_rl.rollout import mask_of
from lit_rl.runners.fragment import Epsilons, Fragment
from lit_rl.trees import iterate

ROUNDING = 1e-6  # of an update
ADDED = 1  # last number of the keys of buffers that were not there from the beginning
ALONE = ""  # the id of the policy of an algorithm that is not part of a `MultiAgent`
MOST_SLOTS = 2**32  # more than any env runner has


def drawn(buffer: ReplayBuffer, algorithm: OffPolicy, num: int, num_steps: tuple[int, int], beta: float) -> TensorDict:
    """A minibatch of `num` rows as an algorithm takes it: transitions or, with memory, the sequences that they fill."""
    length, gamma = algorithm.sequence_length, algorithm.gamma
    if isinstance(buffer, SequenceBuffer):
        return buffer.sample_across(num // buffer.length)
    if length is None:
        return buffer.sample(num, gamma=gamma, num_steps=num_steps, beta=beta)
    return buffer.sample_sequences(
        num // length, length=length, burn_in=algorithm.burn_in, gamma=gamma, num_steps=num_steps, beta=beta
    )


class ReplayFeed:
    """The buffer of one algorithm, and the updates that its rows ask for.

    Args:
        algorithm: that learns; its networks may be made later, but before the first row comes.
        replay: options of the buffer. What is not set is as the algorithm has it.
        key: what its buffer's seed depends on, beside the rank.

    Attributes:
        options: the buffer's.
        buffer: None before the first rows come.
        owed: updates that rows ask for and are not made yet.
        stored: rows of all ranks since the buffer was empty.
        env_steps: of all ranks so far, with those that are not learned from yet.
        some_are_empty: whether there is nothing to draw from the buffers of some ranks.
        recorded: recorded episodes, of which a part of every minibatch is; None if there are none.
        recorded_fraction: that part.
    """

    def __init__(self, algorithm: OffPolicy, replay: Replay, key: tuple[int, ...]):
        self.algorithm, self.key = algorithm, key
        self.options: CompleteReplay = replay.completed(algorithm.REPLAY)
        self.buffer: ReplayBuffer | None = None
        self.owed = 0.0
        self.stored = 0
        self.env_steps = 0
        self.some_are_empty = False
        self.recorded: Any = None
        self.recorded_fraction = 0.0
        self._example: dict[str, Any] | None = None  # a minibatch, while ranks without rows may need it

    # --- env steps ------------------------------------------------------------------------------------------------

    @property
    def is_warming_up(self) -> bool:
        return self.env_steps < self.options.learning_starts

    def epsilons(self, rows: int, times: int) -> list[float]:
        """The probabilities of random actions in the next `times` fragments of `rows` env steps."""
        if self.is_warming_up and self.options.random_warmup:
            return [1.0] * times
        return [self.algorithm.epsilon_at(self.env_steps + k * rows) for k in range(times)]

    def make_buffer(self, seed: np.random.SeedSequence, storage_dir: str | Path | None) -> ReplayBuffer:
        """A buffer for the rows of the algorithm's policy.

        Raises:
            OptionError: if there is no room for it, or a minibatch holds no sequence.
        """
        options, policy, length = self.options, self.algorithm.policy, self.algorithm.sequence_length
        if self.algorithm.ACROSS_EPISODES:
            self._check_across()
        if length is not None and options.batch_size < length:
            raise OptionError(
                f"batch_size={options.batch_size}: expected at least one sequence, sequence_length={length} rows. "
                "Raise it."
            )
        state = dict(iterate(policy.initial_state(1), "state")) if policy.has_memory else None
        try:
            if self.algorithm.ACROSS_EPISODES:
                assert state is not None and length is not None
                return SequenceBuffer(
                    policy.spec, options.buffer_size, state=state, length=length, storage_dir=storage_dir, seed=seed
                )
            return ReplayBuffer(
                policy.spec,
                options.buffer_size,
                state=state,
                priority_alpha=options.priority_alpha if options.prioritized else None,
                storage_dir=storage_dir,
                seed=seed,
            )
        except OptionError:
            raise
        except (MemoryError, OSError, ValueError) as error:
            message = " ".join(str(error).split())
            raise OptionError(
                f"buffer_size={options.buffer_size}: no room for so many rows: {message}. Lower it."
            ) from error

    def _check_across(self) -> None:
        """Refuse options that sequences across the ends of episodes cannot have.

        Raises:
            OptionError: naming the option.
        """
        name, options = type(self.algorithm).__name__, self.options
        if options.prioritized:
            raise OptionError(f"prioritized=True: {name} draws new rows first, and all others alike. Leave it out.")
        if options.num_steps != (1, 1):
            raise OptionError(f"n_step={options.n_step}: {name} sums rewards itself, see its lambda_. Leave it out.")

    def extend(self, fragments: Sequence[tuple[int, Fragment]], rollout_length: int) -> int:
        """Append the fragments of runners, each after its runner's number; returns how many rows that were."""
        assert self.buffer is not None
        taken = 0
        for runner, fragment in fragments:
            arrays = fragment.rows.views() | fragment.finals.views()
            size = len(arrays["reward"])
            envs: Any = range(runner * size, (runner + 1) * size)
            if fragment.slots is not None:  # whose time lines may be others in the next one
                envs = (runner * MOST_SLOTS + fragment.slots).tolist()
            taken += self.buffer.extend(arrays, envs, rollout_length)
        return taken

    def count(self, taken: int, env_steps: int) -> None:
        """So many rows came in so many env steps, of all ranks: updates are owed for them after the warm-up."""
        world_size = distributed.world_size()
        self.stored += taken
        waits = self.algorithm.ACROSS_EPISODES and self.some_are_empty  # no environment has gone on for long enough
        if not waits and not self.is_warming_up and self.stored >= self.options.batch_size * world_size:
            self.owed += taken / world_size * self.options.update_to_data
        self.env_steps += env_steps

    # --- minibatches ----------------------------------------------------------------------------------------------

    def minibatches(self, is_over: Callable[[], bool]) -> Iterator[TensorDict]:
        """Those that are due, until the run is over.

        A `priority` that `update` writes goes back to the buffer, and so do `latents`.
        """
        while self.owed > 1 - ROUNDING and not is_over():
            self.owed -= 1
            minibatch = self.draw()
            yield minibatch
            if "priority" in minibatch.keys():  # noqa: SIM118
                self._take_back(minibatch["index"], minibatch["priority"])
            if "latents" in minibatch.keys():  # noqa: SIM118
                assert isinstance(self.buffer, SequenceBuffer)
                self.buffer.write_states(minibatch["following"], minibatch["latents"])

    def stream(self, env_steps: int, is_over: Callable[[], bool]) -> ReplayStream:
        """Those that are due as a batch, which brings so many env steps of all ranks."""
        stream = ReplayStream(lambda _: ((ALONE, minibatch) for minibatch in self.minibatches(is_over)))
        stream.env_steps = env_steps
        return stream

    def draw(self) -> TensorDict:
        """A minibatch, on the algorithm's device."""
        algorithm = self.algorithm
        minibatch = self._masked(self._drawn() if self.buffer else None) if self.some_are_empty else self._drawn()
        return minibatch if algorithm.device.type == "cpu" else minibatch.to(algorithm.device, non_blocking=True)

    def _drawn(self) -> TensorDict:
        """A minibatch of collected rows and, after them, recorded ones: a fixed number of each."""
        assert self.buffer is not None
        algorithm, num, num_steps = self.algorithm, self.options.batch_size, self.options.num_steps
        if self.recorded is None:
            return drawn(self.buffer, algorithm, num, num_steps, self.beta)
        length, num_recorded = algorithm.sequence_length or 1, self._num_recorded
        collected = drawn(self.buffer, algorithm, num - num_recorded * length, num_steps, self.beta)
        recorded = drawn(self.recorded.buffer, algorithm, num_recorded * length, num_steps, self.beta)
        if algorithm.wants_returns_to_go:  # an episode that goes on has none: what V says of the row stands for it
            zeros = torch.zeros_like(collected["next", "reward"])
            collected["return_to_go"], collected["to_go_discount"] = zeros, torch.ones_like(zeros)
            collected["to_go_observation"] = collected["observation"]
        return torch.cat([collected, recorded])

    @property
    def _num_recorded(self) -> int:
        """Recorded transitions of a minibatch, or sequences."""
        whole = self.options.batch_size // (self.algorithm.sequence_length or 1)
        return min(max(1, round(self.recorded_fraction * whole)), whole - 1)

    def _take_back(self, index: Tensor, priority: Tensor) -> None:
        """Give the rows of a minibatch their new priorities."""
        assert self.buffer is not None
        if self.recorded is None:
            self.buffer.update_priorities(index, priority)
            return
        num = len(index) - self._num_recorded
        self.buffer.update_priorities(index[:num], priority[:num])
        self.recorded.buffer.update_priorities(index[num:], priority[num:])

    def _masked(self, minibatch: TensorDict | None) -> TensorDict:
        """A minibatch with a `mask`. That of a rank without rows is another rank's, without a real row.

        Args:
            minibatch: None on ranks without rows, of which there are some.
        """
        if self._example is None:
            found = distributed.gather(None if minibatch is None else minibatch.to_dict())
            self._example = next(one for one in found if one is not None)
        if minibatch is None:
            masked = TensorDict(self._example, [len(self._example["index"])]).clone()
            masked["mask"] = torch.zeros_like(masked["next", "terminated"])
            return masked
        if mask_of(minibatch) is None:
            minibatch["mask"] = torch.ones_like(minibatch["next", "terminated"])
        return minibatch

    @property
    def beta(self) -> float:
        """The importance weights' exponent now."""
        begin, budget = self.options.priority_beta, self.algorithm.budget
        return begin if budget is None else begin + (1 - begin) * min(1.0, self.env_steps / budget)


class ReplayFeeds(dict[str, ReplayFeed]):
    """The feeds of a datamodule by policy: none, one that is `ALONE`, or those of several policies."""

    def __init__(self) -> None:
        super().__init__()
        self._seed: Callable[..., np.random.SeedSequence]
        self._log_folder: Callable[[], Path]
        self._saved: dict[str, dict[str, Any]] = {}  # buffers of a checkpoint that are not loaded yet, and where
        self._saved_in = Path()
        self._make_recorded: Callable[[str], Any] | None = None
        self._recorded_fraction = 0.0
        self._recorded_saved: dict[str, dict[str, Any]] = {}  # what was to be drawn next of recorded episodes
        self._staging: tempfile.TemporaryDirectory | None = None  # of rows as checkpoints of this run share them

    def setup(
        self,
        algorithms: Mapping[str, OffPolicy],
        replays: Mapping[str, Replay],
        *,
        added: Mapping[str, int],
        seed: Callable[..., np.random.SeedSequence],
        log_folder: Callable[[], Path],
    ) -> None:
        """Feed these algorithms. In a second fit they go on with the buffers of the first.

        Args:
            algorithms: by policy.
            replays: their options.
            added: numbers of the policies with which the run did not begin.
            seed: of this rank's buffers: of the numbers of a policy, none where an algorithm is alone.
            log_folder: where the run's files are; every rank calls it.
        """
        before = dict(self)
        self.clear()
        self._seed, self._log_folder = seed, log_folder
        for number, (policy_id, algorithm) in enumerate(algorithms.items()):
            if policy_id in added:
                self.add(policy_id, algorithm, replays[policy_id], added[policy_id])
            else:
                self[policy_id] = ReplayFeed(algorithm, replays[policy_id], () if policy_id == ALONE else (number,))
            feed, old = self[policy_id], before.get(policy_id)
            if old is not None and old.key == feed.key:
                feed.buffer, feed.owed, feed.stored = old.buffer, old.owed, old.stored
                feed.recorded, feed.recorded_fraction = old.recorded, old.recorded_fraction

    def mix_in(self, make: Callable[[str], Any], fraction: float) -> None:
        """Have recorded rows in every minibatch.

        Args:
            make: what draws them, for the id of a policy; a `RecordedFeed`.
            fraction: of a minibatch, that is recorded.
        """
        self._make_recorded, self._recorded_fraction = make, fraction

    def add(self, policy_id: str, algorithm: OffPolicy, replay: Replay, number: int) -> None:
        """Feed one more algorithm of a run that has begun; its policy has a number that no other has."""
        self[policy_id] = ReplayFeed(algorithm, replay, (number, ADDED))

    def remove(self, policy_id: str) -> None:
        """Feed an algorithm no more, if it was fed; its rows are forgotten."""
        self.pop(policy_id, None)
        self._saved.pop(policy_id, None)

    def rest(self, learning: Collection[str]) -> None:
        """No updates are due for policies that do not learn now: their rows ask for none, also later."""
        for policy_id, feed in self.items():
            if policy_id not in learning:
                feed.owed = 0.0

    def close(self) -> None:
        """Remove the files that are no checkpoint's."""
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None

    # --- env steps ------------------------------------------------------------------------------------------------

    @property
    def keep_states(self) -> bool | frozenset[str]:
        """Whether runners keep a policy's state before every step, or for which of several policies."""
        found = frozenset(policy_id for policy_id, feed in self.items() if feed.algorithm.policy.has_memory)
        return ALONE in found if ALONE in self else found

    def begin(self, env_steps: int) -> None:
        """Rows are to come after so many env steps of all ranks."""
        for feed in self.values():
            feed.env_steps = env_steps

    def make_buffers(self) -> None:
        """Have buffers, those of the checkpoint from which the run is resumed with their rows. Networks are needed."""
        for policy_id, feed in self.items():
            if feed.recorded is None and self._make_recorded is not None:
                feed.recorded, feed.recorded_fraction = self._make_recorded(policy_id), self._recorded_fraction
                if policy_id in self._recorded_saved:
                    feed.recorded.buffer.go_on(self._recorded_saved.pop(policy_id))
            if feed.buffer is not None:
                continue
            storage_dir = feed.options.storage_dir
            folder = None if storage_dir is None else Path(storage_dir) / policy_id
            buffer = feed.make_buffer(self._seed(*feed.key), folder)
            if policy_id in self._saved:
                saved = self._saved.pop(policy_id)
                buffer.load(self._saved_in, saved)
                feed.stored = saved["stored"]
            feed.buffer = buffer

    def epsilons(self, rows: int, times: int = 1) -> Epsilons:
        """See `ReplayFeed.epsilons`; of several policies by policy."""
        found = {policy_id: feed.epsilons(rows, times) for policy_id, feed in self.items()}
        if not found:
            return [0.0] * times
        return found[ALONE] if ALONE in found else [dict(zip(found, each)) for each in zip(*found.values())]

    def take(
        self,
        fragments: Sequence[tuple[int, Fragment]],
        rollout_length: int,
        device: torch.device,
        numbers: Mapping[str, int],
    ) -> int:
        """Put what runners collected into the buffers; returns the env steps of all ranks.

        Args:
            fragments: each after its runner; of several policies those that were trained when it was begun.
            rollout_length: see `ReplayBuffer.extend`.
            device: on which ranks tell each other.
            numbers: of several policies, see `PolicySet`.
        """
        taken: Any = []
        for policy_id, feed in self.items():
            own = fragments
            if policy_id != ALONE:
                own = [(n, f.of(policy_id)) for n, f in fragments if f.has(policy_id, numbers[policy_id])]
            taken.append(feed.extend(own, rollout_length))
        env_steps = sum(fragment.entry.delivered for _, fragment in fragments)  # with several agents not those taken
        empty = [int(feed.buffer is None or not feed.buffer.can_draw) for feed in self.values()]
        if distributed.world_size() > 1:
            counts = distributed.all_reduce_sum(torch.tensor([*taken, *empty, env_steps], device=device)).tolist()
            taken, empty, env_steps = counts[: len(self)], counts[len(self) : -1], counts[-1]
        for feed, num_ranks in zip(self.values(), empty):
            feed.some_are_empty = num_ranks > 0
        for feed, rows in zip(self.values(), taken):
            feed.count(rows, env_steps)
        return env_steps

    def metrics(self) -> dict[str, float]:
        """Of this rank's buffers."""
        found: dict[str, float] = {}
        for policy_id, feed in self.items():
            prefix = f"{policy_id}/replay" if policy_id else "replay"
            if feed.buffer is not None:
                found[f"{prefix}/transitions"] = float(len(feed.buffer))
            if isinstance(feed.buffer, SequenceBuffer):
                found[f"{prefix}/ratio"] = feed.buffer.ratio
            if feed.options.prioritized:
                found[f"{prefix}/beta"] = feed.beta
        return found

    # --- state ----------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Begin with empty buffers."""
        self._saved, self._recorded_saved = {}, {}
        for feed in self.values():
            feed.buffer, feed.owed, feed.stored, feed.recorded = None, 0.0, 0, None

    def state(self, weights_only: bool) -> dict[str, Any]:
        """This rank's part of a checkpoint, in plain data; buffers are written into files, unless `weights_only`."""
        if not self:
            return {}
        if self._saved:
            self.make_buffers()  # nothing was drawn from them yet: they go on to the next checkpoint
        owed = {policy_id: feed.owed for policy_id, feed in self.items()}
        saved = {}
        for policy_id, feed in self.items():
            if feed.buffer is not None and feed.options.checkpoint_buffer and not weights_only:
                folder = self._staged(policy_id)
                saved[policy_id] = feed.buffer.save(folder) | {"stored": feed.stored, "folder": str(folder)}
        mixed = {
            policy_id: feed.recorded.buffer.position(whole=not weights_only)
            for policy_id, feed in self.items()
            if feed.recorded is not None
        }
        recorded = {"recorded": self._recorded_saved | mixed} if self._recorded_saved or mixed else {}
        if ALONE not in self:
            return {"owed": owed, "replays": saved} | recorded
        return {"owed": owed[ALONE]} | ({"replay": saved[ALONE]} if saved else {}) | recorded

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from what `state` returned; the files of the buffers are in `folder`."""
        self.restart()
        owed = {ALONE: state["owed"]} if ALONE in self else state.get("owed", {})
        saved = {ALONE: state["replay"]} if "replay" in state else state.get("replays", {})
        self._saved_in = folder
        self._recorded_saved = dict(state.get("recorded", {}))
        for policy_id, feed in self.items():
            feed.owed = owed.get(policy_id, 0.0)
            if policy_id in saved and feed.options.checkpoint_buffer:
                self._saved[policy_id] = dict(saved[policy_id])

    def share_out(self, before: int, now: int) -> None:
        """The checkpoint is of `before` ranks: all ranks learn, or none does, so the emptiest buffer counts."""
        if before != now:
            self._recorded_saved = {}  # each rank draws from other rows
        for saved in self._saved.values():
            saved["stored"] = saved["stored"] * now // before if now <= before else 0

    def _staged(self, policy_id: str) -> Path:
        """The folder of a policy's rows as this run's checkpoints share them."""
        if self._staging is None:
            folder = self._log_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self._staging = tempfile.TemporaryDirectory(prefix=".replay-", dir=folder)
        folder = Path(self._staging.name) / policy_id
        folder.mkdir(exist_ok=True)
        return folder
