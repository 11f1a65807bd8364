"""Several algorithms in one run, one for each policy of a multi-agent environment."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_rl.algorithm import Algorithm
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.evaluation.summary import EvaluationResult, policy_returns
from lit_rl.files.fits import check_algorithm, check_policy_fits, check_shapes
from lit_rl.files.loading import SECTION
from lit_rl.learner.host import make_host
from lit_rl.learner.refusals import check_streams, check_trainer
from lit_rl.learner.turns import Turns
from lit_rl.membership import Membership
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Groups, Names, check
from lit_rl.parts import Part, check_apart, check_spaces, made_of
from lit_rl.policy import EpisodeInfo, Policy, PolicySet
from lit_rl.policy.mapping import PolicyMapping
from lit_rl.policy.policy_set import check_ids
from lit_rl.policy.register import Register
from lit_rl.policy.scripted import Scripted
from lit_rl.replay import ReplayStream
from lit_rl.rollout import Rollouts
from lit_rl.sharing import CRITIC, ENCODER, Sharing
from lit_rl.source import Source, source_of
from lit_rl.spec import EnvSpec, MultiAgentSpec
from lit_rl.team import Team


class MultiAgent(Membership):
    """Ordinary algorithms, one per policy, beside policies that are not trained.

    Each has its own options, networks, optimizer, normalisers and schedules, and learns from the rows of the agents
    that act by its policy: an on-policy one with one update per rollout, an off-policy one from a replay buffer of its
    own. Their metrics begin with the policy's id: `team/loss/policy`. Policies may share a critic or an encoder: their
    algorithms then take their gradient steps together, see `Team`.

    Reads a `ReplayStream`, if all are off-policy, or a `Rollouts`: a rollout or a stream for each policy that is
    trained.

    Args:
        policies: by id: an algorithm such as `PPO()` or `DQN()`; the path of a checkpoint, whose policy acts as it is;
            `Random()`, or another object with `act(obs)`.
        policy_mapping: which agent acts by which policy: an id for all, a dict of patterns such as
            `{"red_*": "team", "*": "random"}`, of which the first that matches wins, or a function of an agent and an
            `EpisodeInfo`. None: the only policy, or the one that is called as the agent.
        train: ids of the algorithms that learn; None: all of them. The others' policies act as they are. Or a function
            of the number of an update, from 0, that returns the ids of those that learn in it.
        critic_groups: groups of policies by id, `[["left", "right"]]`, each of which has one critic. They learn
            together, by one algorithm with equal options of the optimizer.
        encoder_groups: groups of policies, each of which has one encoder; their heads are their own. They learn
            together, too.
        init_from: checkpoints by policy id, from whose policies these begin; of one that holds several, from the one
            with that id.
        spec: the environment's agents and spaces, a `MultiAgentSpec` in plain data; None takes the datamodule's.
    """

    init_from: Any

    def __init__(
        self,
        policies: dict[str, Algorithm | Scripted | str],
        *,
        policy_mapping: str | dict[str, str] | Callable[[str, EpisodeInfo], str] | None = None,
        train: Names | Callable[[int], Sequence[str]] | None = None,
        critic_groups: Groups | None = None,
        encoder_groups: Groups | None = None,
        init_from: dict[str, str] | None = None,
        spec: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.take_options()
        if not isinstance(policies, Mapping) or not policies:
            raise OptionError(f"policies={policies!r}: expected a dict of algorithms and other policies by id.")
        check_ids(policies)
        made = {policy_id: made_of(policy_id, given) for policy_id, given in policies.items()}
        check_apart(made)
        self._keep(made)
        self.trained = self._chosen(None if callable(train) else train)
        self.turns = Turns(train) if callable(train) else None
        self.register = Register(self.ids)
        algorithms: dict[str, Any] = dict(self.algorithms.items())
        self.sharing = Sharing({CRITIC: critic_groups, ENCODER: encoder_groups}, algorithms, self.trained)
        teams = [Team({policy_id: algorithms[policy_id] for policy_id in ids}) for ids in self.sharing.teams]
        self.teams = {policy_id: team for team in teams for policy_id in team.members}
        if self.teams and self.turns is not None:
            raise OptionError(
                f"train: expected ids, not a function, with {CRITIC} or {ENCODER}: policies that share networks learn "
                "together. Leave one of them out."
            )
        if isinstance(init_from, str):
            raise OptionError(
                f"init_from={init_from!r}: expected a dict of checkpoints by policy, as in "
                f"init_from={{{next(iter(made))!r}: {init_from!r}}}."
            )
        for policy_id in init_from or ():
            if policy_id not in self.algorithms:
                raise OptionError(f"init_from: {policy_id!r}: expected one of the algorithms {list(self.algorithms)}.")
        self.init_from = init_from
        self.given_mapping = policy_mapping
        self.spec = None if spec is None else MultiAgentSpec.from_dict(spec)
        self._num_optimizers: dict[str, int] = {}
        self._specs = {
            i: EnvSpec.from_dict(x["spec"]) for i, x in policies.items() if isinstance(x, dict) and "spec" in x
        }
        self._is_learning = self._is_attached = False  # in an update; in a fit that is set up

    @property
    def learners(self) -> Sequence[Algorithm]:
        return [self.algorithms[policy_id] for policy_id in self.trained]

    def keep_options(self, options: dict[str, Any], caller: Any) -> None:
        """Keep what is plain data; algorithms describe themselves in a checkpoint."""
        mapping = options.get("policy_mapping")
        self.hparams.update({"policy_mapping": mapping if isinstance(mapping, str | dict) else None})
        for name in ("train", CRITIC, ENCODER):
            if not (options.get(name) is None or callable(options[name])):
                self.hparams.update({name: list(options[name])})

    # --- networks -------------------------------------------------------------------------------------------------

    def build_networks(self, source: Source) -> None:
        found = source.spec
        if isinstance(found, EnvSpec):
            raise OptionError(
                f"model=MultiAgent: env={found.env_id} has one agent: expected an environment of several. Use the "
                "algorithm by itself."
            )
        if self.spec is None and found is None:
            raise OptionError(
                "MultiAgent does not know its environment: expected a datamodule, as in trainer.fit(algorithm, "
                "RolloutDataModule('mpe2.simple_tag_v3')), or spec=."
            )
        if self.spec is not None and found is not None and not self._fits(found):
            raise OptionError(
                f"The weights are for the agents {list(self.spec.agents)} of {self.spec.env_id}, but the datamodule's "
                f"environment {found.env_id} has {list(found.agents)}, or other spaces of theirs. Use the environment "
                "they were trained on."
            )
        if "policy" in self.__dict__:
            return
        self.spec, numbers = self.spec or found, self.register.numbers
        mapping = PolicyMapping(self._mapping(self.given_mapping, self.ids), self.ids)
        self._specs = specs = {i: self._spec_of(i, mapping, part) for i, part in self._parts.items()}
        for policy_id, algorithm in self.algorithms.items():
            algorithm.build_networks(Part(source, specs[policy_id], numbers[policy_id], None))
        self.sharing.share()
        policies = {i: self._policy_of(i, specs[i]) for i in self.ids}
        # No module of its own: its parts belong to the algorithms.
        self.__dict__["policy"] = PolicySet(
            self.spec, policies, mapping.given, self.trained, numbers=numbers, specs=specs
        )

    def configure_model(self) -> None:
        is_new, paths = "policy" not in self.__dict__, self.init_from or {}
        if isinstance(paths, str):
            raise OptionError(
                f"init_from={paths!r}: expected a dict of checkpoints by policy with MultiAgent, as in "
                f"--model.init_from '{{{self.trained[0]}: {paths}}}'."
            )
        self.build_networks(source_of(self._trainer))
        if is_new:
            ways = {i: path for i, path in paths.items() if i not in {*self.removed, *self.added}}
            self.sharing.init_from(ways)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        found: list[torch.optim.Optimizer] = []
        for policy_id in self.trained:
            team = self.teams.get(policy_id)
            if team is None:
                optimizers = self.algorithms[policy_id].configure_optimizers()
            else:
                optimizers = [team.configure_optimizer()] if team.first == policy_id else []
            optimizers = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
            self._num_optimizers[policy_id] = len(optimizers)
            found += optimizers
        return found

    def configure_callbacks(self) -> Sequence[L.Callback]:
        self._is_attached = False
        for algorithm in self.algorithms.values():
            check_trainer(self.trainer, algorithm)
        for algorithm in () if self.on_policy else self.off_policy.values():
            check_streams(self.trainer, algorithm)
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        for algorithm in self.algorithms.values():
            algorithm.budget = self.source.budget
            if stage == "fit" and self.trainer.checkpoint_callbacks:
                algorithm.check_nameable()
        super().setup(stage)

    # --- learning -------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        optimizers: Any = self.optimizers()
        left = list(optimizers) if isinstance(optimizers, list) else [optimizers]
        hosts = {}
        for policy_id in self.trained:
            mine = [left.pop(0) for _ in range(self._num_optimizers[policy_id])]
            part = self._part_of(policy_id, self.policy)
            team, algorithm = self.teams.get(policy_id), self.algorithms[policy_id]
            if team is None:
                hosts[policy_id] = make_host(algorithm, self, mine, part)
            else:
                host = make_host(algorithm, self, mine, part, team.names) if mine else hosts[team.first]
                hosts[policy_id] = host.within(part, policy_id)
        own = hosts[self.trained[0]].within(self.source)
        if not own.is_resumed:
            own.source.restart()
        self.attach(own)
        for policy_id, host in hosts.items():
            self.algorithms[policy_id].attach(host)
        self._is_attached = True

    def follow_schedules(self) -> None:
        for policy_id in self.trained:
            self.algorithms[policy_id].follow_schedules()

    @property
    def off_policy(self) -> dict[str, OffPolicy]:
        """The algorithms that learn from replay buffers, by policy."""
        found = {policy_id: self.algorithms[policy_id] for policy_id in self.trained}
        return {policy_id: x for policy_id, x in found.items() if isinstance(x, OffPolicy)}

    @property
    def on_policy(self) -> list[str]:
        """The policies whose algorithms learn from rollouts."""
        return [policy_id for policy_id in self.trained if policy_id not in self.off_policy]

    def name_of(self, policy_id: str) -> str:
        """The class of a policy's algorithm."""
        return type(self.algorithms[policy_id]).__name__

    def metrics_of(self, batch: Any) -> dict[str, Tensor | float]:
        self._is_learning = True
        try:
            found = self._learned_from(batch)
        finally:
            self._is_learning = False
        return {f"{policy_id}/{name}": x for policy_id, metrics in found.items() for name, x in metrics.items()}

    def _learned_from(self, batch: Any) -> dict[str, dict[str, Tensor | float]]:
        """The metrics of each algorithm that learned from a batch."""
        if isinstance(batch, ReplayStream):
            return self._learned_from_stream(batch)
        if not isinstance(batch, Rollouts):
            raise OptionError(
                f"MultiAgent was given a {type(batch).__name__} to learn from: expected a lit_rl.rollout.Rollouts or a "
                "lit_rl.replay.ReplayStream, as RolloutDataModule and ReplayDataModule give them."
            )
        return self._learned_from_rollouts(batch)

    def _learned_from_rollouts(self, batch: Rollouts) -> dict[str, dict[str, Tensor | float]]:
        """The metrics of each algorithm that learns now."""
        found, learning = {}, self.learning
        self.count("env_steps", batch.env_steps)
        self.count("updates", 1)
        for policy_id in self.trained:
            algorithm, team = self.algorithms[policy_id], self.teams.get(policy_id)
            is_there = batch.is_of(policy_id, self.register.numbers[policy_id])
            if is_there and policy_id in learning and policy_id in batch.streams:
                found[policy_id] = algorithm.metrics_of(batch.streams[policy_id])
                continue
            has_rows = False
            if is_there and policy_id in learning:
                rollout = batch[policy_id]
                has_rows = rollout.has_rows
                if team is None:
                    found[policy_id] = algorithm.metrics_of(rollout)
                elif team.first == policy_id:
                    found |= team.metrics_of(batch)
            else:
                algorithm.count("env_steps", batch.env_steps)
            if not (has_rows or isinstance(algorithm, OffPolicy)):
                algorithm.count("updates", 1)  # versions are those of all policies
        return found

    def _learned_from_stream(self, stream: ReplayStream) -> dict[str, dict[str, Tensor | float]]:
        """The metrics of each algorithm that learns now; all of them are off-policy."""
        learning, by_updates = self.learning, self.source.clock == "updates"
        algorithms = {policy_id: x for policy_id, x in self.off_policy.items() if policy_id in learning}
        first = next(iter(algorithms), None)
        for algorithm in algorithms.values():
            algorithm.begin_batch()
        for policy_id, minibatch in stream.by_policy():
            self._count_env_steps(stream.take_env_steps())
            algorithms[policy_id].learn_from_minibatch(minibatch)
            if policy_id == first or not by_updates:  # recorded data has a minibatch for each: one update of all
                self.count("updates", 1)
        self._count_env_steps(stream.take_env_steps())
        return {policy_id: algorithm.end_batch(algorithm.learned()) for policy_id, algorithm in algorithms.items()}

    def _count_env_steps(self, more: int) -> None:
        for algorithm in (self, *self.off_policy.values()) if more else ():
            algorithm.count("env_steps", more)

    @property
    def skipped_updates(self) -> int:
        by_optimizer = [i for i in self.trained if i not in self.teams or self.teams[i].first == i]
        return sum(self.algorithms[policy_id].skipped_updates for policy_id in by_optimizer)

    # --- evaluation and checkpoints -------------------------------------------------------------------------------

    def summarized(self, results: Sequence[EvaluationResult], prefix: str) -> dict[str, float]:
        found, returns = super().summarized(results, prefix), policy_returns(results)
        there = [policy_id for policy_id in returns if policy_id in self.ids]  # others were removed meanwhile
        return found | {f"{policy_id}/{prefix}/return_mean": returns[policy_id] for policy_id in there}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        arguments = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        arguments.pop("network", None)
        arguments["policies"] = {policy_id: self._described(policy_id) for policy_id in self.ids}
        for policy_id in self.ids:
            if not self.policy.names_of(policy_id):
                arguments["policies"][policy_id]["spec"] = self._specs[policy_id].to_dict()
        checkpoint[SECTION]["groups"] = self.sharing.groups
        checkpoint[SECTION]["register"] = self.register.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._follow(checkpoint)
        super().on_load_checkpoint(checkpoint)
        if "register" in checkpoint[SECTION]:
            self.register = Register.from_state(checkpoint[SECTION]["register"])
            self.policy.numbers = dict(self.register.numbers)

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        there = options.get("policies", {})
        return super().changed_options(options) + [
            f"{policy_id}: {changed}"
            for policy_id, algorithm in self.algorithms.items()
            for changed in algorithm.changed_options(there.get(policy_id, {}).get("options", {}))
        ]

    def check_fits(self, found: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
        check_algorithm(self, found)
        there, groups = found["policy"]["policies"], found.get("groups", {})
        began = found.get("register", {}).get("original", list(there))
        for what, in_file, here in (
            ("policies", list(there), list(self.ids)),
            ("train", list(found["policy"]["trained"]), list(self.trained)),
            *((option, groups.get(option, []), here) for option, here in self.sharing.groups.items()),
        ):
            if in_file != here:
                more = "" if what != "policies" or began == in_file else f", and its run began with {began}"
                raise CheckpointError(
                    f"{what}={here}: the checkpoint has {in_file}{more}. Resume with the same, in the same order, or "
                    "begin a new run from its policies with init_from={policy: path}."
                )
        for policy_id, algorithm in self.algorithms.items():
            check_policy_fits(algorithm, {"policy": there[policy_id]})
        check_shapes(self, found, state_dict)

    def rank_state(self) -> dict[str, Any]:
        found = {}
        for policy_id in self.trained:
            algorithm = self.algorithms[policy_id]
            found[policy_id] = algorithm.resume_state() | {"skipped_updates": algorithm.skipped_updates}
        return found

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        for policy_id in self.trained:
            if policy_id in state:  # else it was added since
                algorithm = self.algorithms[policy_id]
                algorithm.load_resume_state(state[policy_id])
                algorithm.resume_skipped(state[policy_id]["skipped_updates"])

    def load_state_of_first(self, state: Mapping[str, Any]) -> None:
        for policy_id in self.trained:
            if policy_id in state:
                algorithm = self.algorithms[policy_id]
                algorithm.load_state_of_first(state[policy_id]["algorithm"])
                algorithm.resume_skipped(state[policy_id]["skipped_updates"])

    def resume_skipped(self, skipped: int) -> None:
        """Nothing: each algorithm goes on with its own number."""

    # ------------------------------------------------------------------------------------------------------------

    def _fits(self, spec: MultiAgentSpec) -> bool:
        """Whether an environment has the same agents and spaces, and the same state if a critic sees it."""
        here, there = self.spec.to_dict(), spec.to_dict()
        kinds = {algorithm.central_input for algorithm in self.algorithms.values()}
        keys = ("agents", "state_space") if "state" in kinds else ("agents",)
        return all(here.get(key) == there.get(key) for key in keys)

    def _chosen(self, train: Any) -> list[str]:
        train = [train] if isinstance(train, str) else check("train", train, Names | None)
        for policy_id in train or ():
            if policy_id not in self.algorithms:
                raise OptionError(
                    f"train: {policy_id!r} is no policy with an algorithm: expected some of {list(self.algorithms)}."
                )
        chosen = [i for i in self.algorithms if train is None or i in train]
        if not chosen:
            mend = f"Name one of {list(self.algorithms)}" if self.algorithms else "Give one of them an algorithm"
            raise OptionError(f"train={train!r}: none of the policies {list(self.ids)} is trained. {mend}.")
        return chosen

    def _policy_of(self, policy_id: str, spec: EnvSpec) -> Policy | Scripted:
        if policy_id in self.algorithms:
            return self.algorithms[policy_id].policy
        if policy_id in self.scripted:
            return self.scripted[policy_id]
        check_spaces(policy_id, self.frozen[policy_id], spec)
        return self.frozen[policy_id]
