"""Policies of a `MultiAgent` that are added and removed, also while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lit_rl import distributed
from lit_rl.algorithm import Algorithm
from lit_rl.central import with_central
from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.loading import SECTION
from lit_rl.learner.host import make_host
from lit_rl.learner.joining import check_callbacks, join, leave, wrapped
from lit_rl.learner.refusals import check_streams, check_trainer
from lit_rl.learner.reporting import forget
from lit_rl.learner.turns import Turns
from lit_rl.off_policy import OffPolicy
from lit_rl.parts import Part, check_apart, check_spaces, class_name, made_again, made_of
from lit_rl.policy import Policy, PolicySet
from lit_rl.policy.mapping import Mapped, PolicyMapping
from lit_rl.policy.policy_set import check_ids
from lit_rl.policy.register import Register
from lit_rl.policy.scripted import Scripted
from lit_rl.roster import is_pattern
from lit_rl.source import source_of
from lit_rl.spec import EnvSpec
from lit_rl.team import Team


class Membership(Algorithm):
    """The part of `MultiAgent` that knows which policies there are, and which agent acts by which.

    Attributes:
        ids: of the policies.
        algorithms, frozen, scripted: the policies by id, of each kind.
        trained: ids of the algorithms that learn.
        turns: says which of them learn in an update; None: all.
        given_mapping: as the user gave it.
        register: which policies the run began with, and which came and went since.
    """

    policy: Any
    spec: Any
    ids: tuple[str, ...]
    algorithms: Any
    frozen: Any
    scripted: dict[str, Any]
    trained: list[str]
    turns: Turns | None
    given_mapping: Any
    register: Register
    teams: dict[str, Team]  # of algorithms that share networks, by policy
    _specs: dict[str, EnvSpec]  # of the agents of each policy, the last that it had
    _num_optimizers: dict[str, int]
    _is_learning: bool  # in an update
    _is_attached: bool  # in a fit that is set up

    def add_policy(
        self, policy_id: str, policy: Algorithm | Policy | Scripted | str, *, policy_mapping: Mapped | None = None
    ) -> None:
        """Have one more policy, from the next rollout that is begun on.

        To be called before `fit` or, by every learner process, from a callback between updates. An algorithm learns
        from then on, and its schedules follow the run's clock. In episodes under way agents keep their policies.

        Args:
            policy_id: of the new policy.
            policy: one of those that `policies` takes, or a `Policy` such as `frozen_copy` gives.
            policy_mapping: in the place of the one that there is, which stays if this is None. It has to give the
                policy an agent; others may be left without one.

        Raises:
            OptionError: if that cannot be. Nothing is changed then.
        """
        call = f"add_policy({policy_id!r})"
        self._check_moment(call)
        check_ids({policy_id: policy})
        if policy_id in self.ids:
            raise OptionError(
                f"{call}: expected another id than those of the policies that there are, {list(self.ids)}."
            )
        made = made_of(policy_id, policy)
        if self._is_at_work and isinstance(made, Algorithm) and made.central_input is not None:
            raise OptionError(
                f"{call}: central_critic={made.central_input!r}: what a central critic sees is collected from the "
                "beginning of training on. Leave it out, or add the policy before trainer.fit."
            )
        self._change(self._parts | {policy_id: made}, policy_mapping)

    def remove_policy(self, policy_id: str, *, policy_mapping: Mapped | None = None) -> None:
        """Have a policy no more, from the next rollout that is begun on: see `add_policy`.

        Copies of the environment in whose episode it acts begin another one. Rows of it that are on their way are left
        out, and the state of its optimizer is dropped.

        Args:
            policy_id: of the policy.
            policy_mapping: in the place of the one that there is, which must not name the policy any more.

        Raises:
            OptionError: if that cannot be. Nothing is changed then.
        """
        call = f"remove_policy({policy_id!r})"
        self._check_moment(call)
        if policy_id not in self.ids:
            raise OptionError(f"{call}: expected one of the policies {list(self.ids)}.")
        if policy_id in self.teams:
            others = [i for i in self.teams[policy_id].members if i != policy_id]
            raise OptionError(
                f"{call}: it shares networks with {others}, and learns together with them: expected another policy."
            )
        if list(self.trained) == [policy_id]:
            raise OptionError(f"{call}: it is the only policy that is trained. Add another one before.")
        if policy_mapping is None and self._is_named(policy_id):
            raise OptionError(f"{call}: policy_mapping still names it. Pass another one with it, as policy_mapping=.")
        self._change({i: part for i, part in self._parts.items() if i != policy_id}, policy_mapping)

    def set_policy_mapping(self, policy_mapping: Mapped) -> None:
        """Have agents act by other policies, from the next episode of each copy of the environment on.

        To be called when `add_policy` may be. A policy may be left without an agent.

        Raises:
            OptionError: if the mapping names a policy that there is not, or agents' spaces do not fit.
        """
        self._check_moment("set_policy_mapping(...)")
        self._change(self._parts, policy_mapping)

    def frozen_copy(self, policy_id: str) -> Policy:
        """A copy of a policy as it is now, which acts and does not learn: a past version for `add_policy`.

        Raises:
            OptionError: if there is no such policy, or it has no weights.
        """
        if "policy" not in self.__dict__:
            raise OptionError(
                f"frozen_copy({policy_id!r}): there are no networks yet. Call it while the model trains, or once it is "
                "loaded from a checkpoint."
            )
        learned = self.policy.learned
        if policy_id not in learned:
            raise OptionError(
                f"frozen_copy({policy_id!r}): expected one of the policies with weights, {list(learned)}."
            )
        return learned[policy_id].acting_copy().requires_grad_(False).train()

    @property
    def added(self) -> dict[str, int]:
        """The policies with which the run did not begin, each with a number of its own."""
        return self.register.added

    @property
    def removed(self) -> list[str]:
        """The policies with which the run began, and that are not there any more."""
        return self.register.removed

    @property
    def learning(self) -> list[str]:
        """The policies whose algorithms learn in the next update; with a `ReplayDataModule` in the next batch."""
        return self.trained if self.turns is None else self.turns.at(self.updates_done, self.trained)

    @property
    def _parts(self) -> dict[str, Any]:
        """All policies, as they were given."""
        found = {**self.algorithms, **self.frozen, **self.scripted}
        return {policy_id: found[policy_id] for policy_id in self.ids}

    @property
    def _is_at_work(self) -> bool:
        """Whether the Trainer is."""
        return self._trainer is not None and self._trainer.state.status == TrainerStatus.RUNNING

    def _check_moment(self, call: str) -> None:
        if self._is_learning:
            raise OptionError(
                f"{call}: an update is under way. Call it between updates, as from on_train_batch_end or "
                "on_train_epoch_end."
            )
        if self._is_at_work:
            if not self._is_attached:
                raise OptionError(
                    f"{call}: the Trainer does not train yet. Call it before trainer.fit, or from on_train_start on."
                )
            check_callbacks(self._trainer, call)

    def _change(self, parts: dict[str, Any], given_mapping: Mapped | None) -> None:
        """Have these policies instead of those there are; those that are in both stay as they are."""
        check_apart(parts)
        given = self.given_mapping if given_mapping is None else given_mapping
        register = self.register.changed(list(parts), mapping=given_mapping is not None)
        new = {policy_id: part for policy_id, part in parts.items() if policy_id not in self.ids}
        gone = [policy_id for policy_id in self.ids if policy_id not in parts]
        trained = [i for i, x in parts.items() if isinstance(x, Algorithm) and (i in self.trained or i in new)]
        if "policy" not in self.__dict__:  # what does not fit the environment is refused when it is known
            if given is not None:
                PolicyMapping(given, list(parts))
            self._take(parts, trained, given, register)
            return
        mapping = PolicyMapping(self._mapping(given, list(parts)), list(parts))
        specs = {i: self._spec_of(i, mapping, part, is_new=i in new) for i, part in parts.items()}
        for policy_id, part in new.items():
            if isinstance(part, Algorithm):
                part.build_networks(Part(source_of(self._trainer), specs[policy_id], register.numbers[policy_id], None))
            elif isinstance(part, Policy):
                check_spaces(policy_id, part, specs[policy_id])
            if isinstance(part, nn.Module):
                part.to(self.device)
                distributed.share([*part.parameters(), *part.buffers()])
        policies = {i: x.policy if isinstance(x, Algorithm) else x for i, x in parts.items()}
        policy = PolicySet(self.spec, policies, mapping.given, trained, numbers=register.numbers, specs=specs)
        if self._is_at_work:
            self.source.before_change()
            for policy_id, part in new.items():
                if isinstance(part, Algorithm):
                    self._attach_new(policy_id, part, policy)
            self._detach(gone)
        self._take(parts, trained, given, register)
        self._specs, self.__dict__["policy"] = specs, policy
        if self._is_at_work:
            self._host = self.algorithms[self.trained[0]].host.within(self.source)

    def _attach_new(self, policy_id: str, algorithm: Algorithm, policy: PolicySet) -> None:
        """Have an algorithm learn from now on, in a fit that is under way."""
        check_trainer(self.trainer, algorithm)
        if all(isinstance(learner, OffPolicy) for learner in self.learners):
            check_streams(self.trainer, algorithm)
        if self.trainer.checkpoint_callbacks:
            algorithm.check_nameable()
        self.source.check_policy(policy_id, algorithm)
        optimizers = wrapped(self.trainer, algorithm.configure_optimizers())
        host = make_host(algorithm, self, optimizers, self._part_of(policy_id, policy))
        algorithm.attach(replace(host, is_resumed=False))
        algorithm.count("env_steps", self.env_steps_done)
        if not isinstance(algorithm, OffPolicy):
            algorithm.count("updates", self.updates_done)  # versions are those of all policies
        algorithm.follow_schedules()
        join(self.trainer, optimizers)
        self._num_optimizers[policy_id] = len(optimizers)
        self.source.add_policy(policy_id, algorithm, policy.numbers[policy_id])

    def _detach(self, policy_ids: Sequence[str]) -> None:
        """Have the algorithms of policies learn no more, in a fit that is under way."""
        for policy_id in policy_ids:
            if policy_id in self.trained:
                leave(self.trainer, self.algorithms[policy_id].host.steps.optimizers)
                del self._num_optimizers[policy_id]
                self.source.remove_policy(policy_id)
            forget(self.trainer, f"{policy_id}/")
            for rank in self._resume["ranks"] if self._resume is not None else ():
                rank["algorithm"].pop(policy_id, None)

    def _keep(self, parts: Mapping[str, Any]) -> None:
        self.ids = tuple(parts)
        self.algorithms = nn.ModuleDict({i: x for i, x in parts.items() if isinstance(x, Algorithm)})
        self.frozen = nn.ModuleDict({i: x for i, x in parts.items() if isinstance(x, Policy)})
        self.scripted = {i: x for i, x in parts.items() if not isinstance(x, nn.Module)}

    def _take(self, parts: Mapping[str, Any], trained: list[str], mapping: Any, register: Register) -> None:
        """Have these policies and this mapping, also in checkpoints."""
        kept = {policy_id for policy_id, n in register.numbers.items() if self.register.numbers.get(policy_id) == n}
        self._specs = {policy_id: spec for policy_id, spec in self._specs.items() if policy_id in kept}
        self._keep(parts)
        self.trained, self.given_mapping, self.register = trained, mapping, register
        self.hparams.update({"policy_mapping": mapping if isinstance(mapping, str | dict) else None})
        if "train" in self.hparams:
            self.hparams.update({"train": list(trained)})

    def _is_named(self, policy_id: str) -> bool:
        """Whether the mapping names a policy, as far as that is known now."""
        given, names = self.given_mapping, [] if self.spec is None else list(self.spec.agents)
        if given is None and self.spec is None:
            return False
        return policy_id in PolicyMapping(self._mapping(given, self.ids), self.ids).named(names)

    def _follow(self, checkpoint: Mapping[str, Any]) -> None:
        """Have the policies, and the mapping, that the run of a checkpoint had when it was written.

        Raises:
            CheckpointError: if one that was added cannot be made from the file.
        """
        found = checkpoint.get(SECTION, {})
        if "register" not in found:
            return
        register, described = Register.from_state(found["register"]), checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        if not register.is_of(self.ids):
            return  # which is refused next, as the checkpoint does not fit
        here, parts, specs = self._parts, {}, {}
        for policy_id, description in described["policies"].items():
            if "spec" in description:  # of one that the mapping gives no agent
                specs[policy_id] = EnvSpec.from_dict(description.pop("spec"))
            is_new = policy_id in register.added and (
                policy_id not in here or self._described(policy_id) != description
            )
            parts[policy_id] = made_again(policy_id, description) if is_new else here[policy_id]
        if not register.is_mapping_changed and list(parts.items()) == list(here.items()):
            return
        mapping = self.given_mapping
        if register.is_mapping_changed:
            mapping = found["policy"]["mapping"] or mapping
            if not (found["policy"]["mapping"] or callable(mapping)):
                raise CheckpointError(
                    "policy_mapping: it was changed to a function while the run trained, and a file holds none: pass "
                    "that function as policy_mapping=."
                )
        others = [i for i in found["policy"]["trained"] if i in register.added]
        trained = [i for i, x in parts.items() if isinstance(x, Algorithm) and i in {*self.trained, *others}]
        self._take(parts, trained, mapping, register)
        self._specs |= specs
        del self.__dict__["policy"]
        self.build_networks(source_of(self._trainer))
        if self._trainer is not None and self._trainer.training:
            for policy_id in here.keys() - parts.keys():
                self.source.remove_policy(policy_id)
            for policy_id in trained:
                if parts[policy_id] is not here.get(policy_id):
                    self._feed(policy_id)

    def _feed(self, policy_id: str) -> None:
        """Have the datamodule feed the algorithm of a policy that was added."""
        algorithm = self.algorithms[policy_id]
        algorithm.budget = self.source.budget
        self.source.check_policy(policy_id, algorithm)
        self.source.remove_policy(policy_id)  # another one of that id
        self.source.add_policy(policy_id, algorithm, self.register.numbers[policy_id])

    def _part_of(self, policy_id: str, policy: PolicySet) -> Part:
        """The datamodule, as one of the algorithms sees it while it learns."""
        share = len(policy.slots_of(policy_id)) / self.spec.num_slots
        return Part(
            self.source, policy.spec_of(policy_id), policy.numbers[policy_id], share or None, self.turns is not None
        )

    def _mapping(self, given: Any, ids: Sequence[str]) -> Any:
        """The mapping that is meant by what was given, among policies."""
        if given is not None:
            return given
        if len(ids) == 1:
            return ids[0]
        missing = [name for name in self.spec.agents if is_pattern(name) or name not in ids]
        if missing:
            raise OptionError(
                f"policy_mapping: expected it, since no policy is called {missing[0]!r} as the agent is. Give a dict "
                f"of patterns, as in policy_mapping={{{missing[0]!r}: {ids[0]!r}, ...}}."
            )
        return {name: name for name in self.spec.agents}

    def _spec_of(self, policy_id: str, mapping: PolicyMapping, part: Any, *, is_new: bool = False) -> EnvSpec:
        """The spaces of the agents to whom a mapping gives a policy, or gave it before if there is none any more.

        Raises:
            OptionError: if there was none ever, or their spaces differ.
        """
        names, known = mapping.names_of(policy_id, list(self.spec.agents)), self._specs.get(policy_id)
        kind = part.central_input if isinstance(part, Algorithm) else None
        if known is None or is_new:
            return with_central(self.spec, kind, names, policy_id)
        spec = with_central(self.spec, kind, names, policy_id) if names else known
        for kind in ("observation_space", "action_space"):
            if getattr(spec, kind) != getattr(known, kind):
                raise OptionError(
                    f"policies[{policy_id!r}]: policy_mapping gives it agents with {kind} {getattr(spec, kind)}, but "
                    f"it was made for {getattr(known, kind)}. Map agents of equal spaces."
                )
        return spec

    def _described(self, policy_id: str) -> dict[str, Any]:
        """One of the policies in plain data, from which `made_of` makes it again."""
        if policy_id in self.algorithms:
            algorithm = self.algorithms[policy_id]
            options = dict(algorithm.hparams) | algorithm.describe_networks()
            return {"class": class_name(type(algorithm)), "options": options}
        if policy_id in self.frozen:
            return {"policy": self.frozen[policy_id].describe()}
        return {"class": class_name(type(self.scripted[policy_id])), "options": {}}
