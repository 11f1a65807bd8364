"""Options: limits in annotations, classes that hand options to their parents, dataclasses of options."""

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from envs import CounterEnv

import lit_rl
from lit_rl import (
    BC,
    CQL,
    DQN,
    PPO,
    SAC,
    TQC,
    Evaluation,
    FaultTolerance,
    OfflineDataModule,
    Placement,
    Rainbow,
    Replay,
    ReplayDataModule,
    RolloutDataModule,
    ScaleEnvRunners,
    cli,
    peers,
)
from lit_rl.cli.cluster import Cluster
from lit_rl.errors import LitRLError, OptionError
from lit_rl.options import (
    Arguments,
    Count,
    CountOrZero,
    Counts,
    Folder,
    InstanceOf,
    Limit,
    Names,
    NonNegative,
    NumberOr,
    OneOf,
    Positive,
    PositiveFraction,
    TakesOptions,
    TwoOrMore,
    UnitInterval,
    Within,
    check,
    check_ending,
    check_fields,
    options_of,
    taken,
    with_fields_of,
)
from lit_rl.replay.options import Steps

NAN, INF = math.nan, math.inf
Word = Annotated[str, OneOf("mean", "sum")]
WordOrNone = Annotated[str | None, OneOf(None, "categorical", "quantile")]
AutoOrNumber = Annotated[float | str, NumberOr("auto")]
UpToFive = Annotated[int, Within(1, 5, whole=True)]

# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value", "kept"),
    [
        (Positive, 1e-9, 1e-9),
        (Positive, 3, 3.0),
        (Positive, np.float32(0.5), 0.5),
        (NonNegative, 0, 0.0),
        (UnitInterval, 0.0, 0.0),
        (UnitInterval, 1, 1.0),
        (PositiveFraction, 1.0, 1.0),
        (float, -1e300, -1e300),
        (Count, 1, 1),
        (Count, np.int64(7), 7),
        (CountOrZero, 0, 0),
        (TwoOrMore, 2, 2),
        (UpToFive, 5, 5),
        (int, -3, -3),
        (bool, False, False),
        (Word, "sum", "sum"),
        (WordOrNone, None, None),
        (AutoOrNumber, "auto", "auto"),
        (AutoOrNumber, -2, -2.0),
        (Counts, (64, 32), [64, 32]),
        (Counts, [], []),
        (Names, ["a", "b"], ("a", "b")),
        (Arguments, {"n": 1}, {"n": 1}),
        (Folder, Path("x"), Path("x")),
        (Steps, 3, 3),
        (Steps, [1, 5], (1, 5)),
        (str, 3, 3),  # a type without a limit
    ],
    ids=repr,
)
def test_an_accepted_value_is_kept_as_plain_data_of_one_type(annotation: Any, value: Any, kept: Any) -> None:
    found = check("x", value, annotation)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("annotation", "values", "words"),
    [
        (Positive, [0, 0.0, -0.1, NAN, INF, "0.5", None, True, [0.5]], "a number, above 0"),
        (NonNegative, [-1e-9, -INF, None], "a number, at least 0"),
        (UnitInterval, [-0.1, 1.1, NAN, INF, -INF, "0.5", None, True, [0.5]], "a number, at least 0 and at most 1"),
        (PositiveFraction, [0.0, 1.1, None], "a number, above 0 and at most 1"),
        (Annotated[float, Within(high=1.0)], [1.5, None], "a number, at most 1"),
        (float, [INF, NAN, "1", True, None], "a number, finite"),
        (Count, [0, -1, 1.0, 1.5, "2", None, True], "a whole number of at least 1"),
        (CountOrZero, [-1, 0.0, False], "a whole number of at least 0"),
        (TwoOrMore, [1], "a whole number of at least 2"),
        (UpToFive, [0, 6], "a whole number of at least 1 and at most 5"),
        (int, [1.0, "1", True, None], "a whole number"),
        (bool, [0, 1, "no", None], "True or False"),
        (Word, ["max", None, 1], "one of 'mean', 'sum'"),
        (WordOrNone, ["c51", 0], "None, 'categorical' or 'quantile'"),
        (AutoOrNumber, ["automatic", INF, None, True], "a number, finite, or 'auto'"),
        (Counts, [64, "64", {64}, None], "a list of whole numbers, such as [64, 64]"),
        (Names, ["score", 3, [3], None], "a list of keys"),
        (Arguments, [[1], "a", None], "a dict of arguments"),
        (Folder, [3, None], "a folder's path"),
        (Steps, [[5, 1], [1, 2, 3], []], "a whole number, or [low, high]"),
        (Evaluation, [None, {"episodes": 3}, Replay()], "Evaluation(...)"),
    ],
    ids=repr,
)
def test_what_is_refused_is_named_with_its_value_and_what_was_expected(
    annotation: Any, values: list, words: str
) -> None:
    for value in values:
        with pytest.raises(OptionError) as error:
            check("x", value, annotation)
        assert str(error.value) == f"x={value!r}: expected {words}."


def test_parts_of_lists_are_named_themselves() -> None:
    for annotation, value in ((Counts, [64, 0]), (Steps, [0, 3]), (Steps, 0)):
        with pytest.raises(OptionError, match=r"x=0: expected a whole number of at least 1\."):
            check("x", value, annotation)


def test_none_passes_where_the_annotation_has_it_and_nowhere_else() -> None:
    assert check("x", None, Positive | None) is None
    assert check("x", None, bool | None) is None
    assert check("x", 2, Positive | None) == 2.0
    with pytest.raises(OptionError, match=r"x=-1: expected a number, above 0\."):
        check("x", -1, Positive | None)
    with pytest.raises(OptionError, match=r"x='yes': expected True or False\."):
        check("x", "yes", bool | None)


def test_a_union_of_several_types_is_not_looked_at() -> None:
    for value in (3, "x", None, object()):
        assert check("x", value, int | str) is value
        assert check("x", value, None) is value


def test_a_limit_of_ones_own_needs_two_methods() -> None:
    class Even(Limit):
        def accepts(self, value: Any) -> bool:
            return value % 2 == 0

        def __repr__(self) -> str:
            return "an even number"

    assert check("x", 4, Annotated[int, Even()]) == 4
    with pytest.raises(OptionError, match=r"x=3: expected an even number\."):
        check("x", 3, Annotated[int, Even()] | None)
    with pytest.raises(NotImplementedError, match=r"Limit must define accepts\(value\)"):
        Limit()("x", 1)


def test_a_limit_can_be_called_by_itself() -> None:
    assert OneOf("tanh", "relu")("activation", "tanh") == "tanh"
    with pytest.raises(OptionError, match=r"activation='gelu': expected one of 'tanh', 'relu'\."):
        OneOf("tanh", "relu")("activation", "gelu")
    assert InstanceOf((int, str), "a number or a text")("x", "a") == "a"


def test_an_option_error_is_a_value_error_a_user_can_mend() -> None:
    assert issubclass(OptionError, LitRLError) and issubclass(OptionError, ValueError)


def test_check_ending_returns_it_in_lower_case_and_names_the_others() -> None:
    assert check_ending("video", "a/b.GIF", (".mp4", ".gif")) == ".gif"
    with pytest.raises(OptionError, match=r"output='a.bmp': expected a name that ends in .png, .svg or .pdf\."):
        check_ending("output", "a.bmp", (".png", ".svg", ".pdf"))


# --- dataclasses of options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Evaluation(episodes=0), "evaluation.episodes=0: expected a whole number of at least 1."),
        (lambda: Evaluation(deterministic="no"), "evaluation.deterministic='no': expected True or False."),
        (lambda: Evaluation(timeout_s=0), "evaluation.timeout_s=0: expected a number, above 0."),
        (lambda: Evaluation(env_kwargs=[1]), "evaluation.env_kwargs=[1]: expected a dict of arguments."),
        (
            lambda: Evaluation(env=3),
            "evaluation.env=3: expected a gymnasium id such as 'CartPole-v1', 'package.module:Class', a callable that "
            "returns an environment (its class, or a function), or a module of PettingZoo.",
        ),
        (
            lambda: Evaluation(num_env_runners=-1),
            "evaluation.num_env_runners=-1: expected a whole number of at least 0.",
        ),
        (
            lambda: Evaluation(parallel=True),
            "evaluation.parallel=True: evaluating while training goes on needs evaluation.num_env_runners of at least "
            "1, got 0.",
        ),
        (lambda: Placement(num_cpus=-1), "placement.num_cpus=-1: expected a number, at least 0."),
        (lambda: Placement(strategy="PACK"), "placement.strategy='PACK': expected one of 'DEFAULT', 'SPREAD'."),
        (
            lambda: FaultTolerance(step_timeout_s=0.0),
            "fault_tolerance.step_timeout_s=0.0: expected a number, above 0.",
        ),
        (lambda: Cluster(max_failures=-2), "cluster.max_failures=-2: expected a whole number of at least -1."),
        (lambda: Replay(priority_alpha=2), "priority_alpha=2: expected a number, at least 0 and at most 1."),
        (
            lambda: RolloutDataModule("CartPole-v1", evaluation=None),
            "evaluation=None: expected Evaluation(...).",
        ),
        (
            lambda: RolloutDataModule("CartPole-v1", fault_tolerance={"max_restarts": 1}),
            "fault_tolerance={'max_restarts': 1}: expected FaultTolerance(...).",
        ),
        (lambda: RolloutDataModule("CartPole-v1", placement=None), "placement=None: expected Placement(...)."),
        (
            lambda: RolloutDataModule(3),
            "env=3: expected a gymnasium id such as 'CartPole-v1', 'package.module:Class', a callable that returns an "
            "environment (its class, or a function), or a module of PettingZoo.",
        ),
    ],
)  # fmt: skip
def test_a_field_is_named_with_the_option_it_belongs_to(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value) == words


def test_a_frozen_dataclass_keeps_its_fields_as_plain_data_too() -> None:
    @dataclass(frozen=True)
    class Heat:
        power: Positive = 1.0
        hidden_sizes: Counts = ()

        def __post_init__(self) -> None:
            check_fields(self, "heat.")

    heat = Heat(power=2, hidden_sizes=(8, 8))
    assert (heat.power, type(heat.power), heat.hidden_sizes) == (2.0, float, [8, 8])


# --- classes --------------------------------------------------------------------------------------------------------


class Heater(TakesOptions):
    """Args:
    power: watts.
    """

    RENAMED: Mapping[str, str] = {"watts": "power"}

    power: float

    def __init__(self, name: str = "h", *, power: Positive = 2.0, power_schedule: Any = "constant", fan: bool = False):
        super().__init__()
        self.take_options()


class Lamp(Heater):
    lumens: int

    def __init__(self, *, lumens: Count = 800, power: UnitInterval = 0.5, **options: Any):
        super().__init__(power=power, **options)
        self.take_options()


class Torch(Lamp):
    """Keeps nothing itself."""

    def __init__(self, colour: str = "red", **options: Any):
        super().__init__(**options)
        self.colour = colour


def test_a_parent_checks_and_keeps_its_own_options_and_a_subclass_its_own() -> None:
    lamp = Lamp(lumens=3, name="l", fan=True, power=1)
    assert vars(lamp) == {"name": "l", "power": 1.0, "power_schedule": "constant", "fan": True, "lumens": 3}
    with pytest.raises(OptionError, match=r"fan='on': expected True or False\."):
        Lamp(fan="on")
    with pytest.raises(OptionError, match=r"lumens=0: expected a whole number of at least 1\."):
        Lamp(lumens=0)
    with pytest.raises(OptionError, match=r"power=2: expected a number, at least 0 and at most 1\."):
        Lamp(power=2)  # the parent alone would take it
    torch_ = Torch("blue", lumens=4)
    assert (torch_.lumens, torch_.power, torch_.colour) == (4, 0.5, "blue")


def test_options_of_a_class_are_its_own_and_those_that_reach_its_parents() -> None:
    assert list(options_of(Torch) or {}) == ["colour", "lumens", "power", "name", "power_schedule", "fan"]
    assert (options_of(Torch) or {})["power"].default == 0.5

    class Closed(Lamp):
        def __init__(self, lumens: int = 1):
            super().__init__(lumens=lumens)

    class Open(TakesOptions):
        def __init__(self, **anything: Any):
            self.anything = anything

    assert list(options_of(Closed) or {}) == ["lumens"]
    with pytest.raises(OptionError, match=r"Closed\(power=...\): there is no such option\."):
        Closed(power=1)
    assert options_of(Open) is None and Open(a=1).anything == {"a": 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Heater(colour=3), "Heater(colour=...): there is no such option."),
        (lambda: Heater(powr=3), "Heater(powr=...): there is no such option. Did you mean 'power'?"),
        (lambda: Torch(watts=3), "Torch(watts=...): there is no such option. It is called power now."),
        (
            lambda: PPO(entropy_schedule="linear"),
            "PPO(entropy_schedule=...): there is no such option. It is called entropy_coef_schedule now.",
        ),
        (
            lambda: PPO("MlpPolicy", "CartPole-v1"),  # type: ignore[misc]
            "PPO('MlpPolicy', 'CartPole-v1'): expected options by name, such as lr=3e-4. The environment goes to the "
            "datamodule.",
        ),
        (
            lambda: RolloutDataModule("CartPole-v1", 8),  # type: ignore[misc]
            "RolloutDataModule('CartPole-v1', 8): expected options by name.",
        ),
        (
            lambda: PPO(network=[64, 64]),  # type: ignore[arg-type]
            "network=[64, 64]: expected a callable from an observation space to an nn.Module, such as the class itself "
            "or a functools.partial of it: functools.partial(MLP, hidden_sizes=[64, 64]).",
        ),
        (
            lambda: SAC(critic_network="MLP"),  # type: ignore[arg-type]
            "critic_network='MLP': expected a callable from an observation space to an nn.Module, such as the class "
            "itself or a functools.partial of it: functools.partial(MLP, hidden_sizes=[64, 64]).",
        ),
        (lambda: PPO(learning_rate=1e-3), "PPO(learning_rate=...): there is no such option. It is called 'lr' here."),
        (
            lambda: PPO(n_steps=8),
            "PPO(n_steps=...): there is no such option. It is called 'rollout_length' here, and is an option of "
            "RolloutDataModule.",
        ),
        (
            lambda: PPO(max_env_steps=8),
            "PPO(max_env_steps=...): there is no such option. It is an option of RolloutDataModule.",
        ),
        (lambda: SAC(ent_coef=0.1), "SAC(ent_coef=...): there is no such option. It is called 'initial_alpha' here."),
        (
            lambda: RolloutDataModule("CartPole-v1", n_envs=2),
            "RolloutDataModule(n_envs=...): there is no such option. It is called 'num_envs_per_env_runner' here.",
        ),
        (lambda: TQC(num_quantile=3), "TQC(num_quantile=...): there is no such option. Did you mean 'num_quantiles'?"),
        (lambda: Rainbow(gama=0.9), "Rainbow(gama=...): there is no such option. Did you mean 'gamma'?"),
        (
            lambda: ReplayDataModule("CartPole-v1", bufer_size=3),
            "ReplayDataModule(bufer_size=...): there is no such option. Did you mean 'buffer_size'?",
        ),
        (
            lambda: RolloutDataModule("CartPole-v1", eval_episodes=3),
            "RolloutDataModule(eval_episodes=...): there is no such option. It is called "
            "evaluation=Evaluation(episodes=...) now.",
        ),
        (
            lambda: ReplayDataModule("CartPole-v1", num_eval_env_runners=3),
            "ReplayDataModule(num_eval_env_runners=...): there is no such option. It is called "
            "evaluation=Evaluation(num_env_runners=...) now.",
        ),
        (
            lambda: Replay(batch_sise=3),  # type: ignore[call-arg]
            "Replay(batch_sise=...): there is no such option. Did you mean 'batch_size'?",
        ),
        (
            lambda: Evaluation(3, episods=3),  # type: ignore[call-arg]
            "Evaluation(episods=...): there is no such option. Did you mean 'episodes'?",
        ),
        (
            lambda: FaultTolerance(max_restarst=3),  # type: ignore[call-arg]
            "FaultTolerance(max_restarst=...): there is no such option. Did you mean 'max_restarts'?",
        ),
        (lambda: Placement(gpus=3), "Placement(gpus=...): there is no such option."),  # type: ignore[call-arg]
        (
            lambda: ScaleEnvRunners(max_runners=3),
            "ScaleEnvRunners(max_runners=...): there is no such option. Did you mean 'max_env_runners'?",
        ),
        (
            lambda: DQN(epsilon=[[0, 1.0], [100, 0.1]]),
            "epsilon=[[0, 1.0], [100, 0.1]]: expected a number, at least 0 and at most 1. Points [[env_step, value], "
            "...] go to epsilon_schedule.",
        ),
        (
            lambda: SAC(lr=[[0, 1.0]]),
            "lr=[[0, 1.0]]: expected a number, above 0. Points [[env_step, value], ...] go to lr_schedule.",
        ),
        (
            lambda: OfflineDataModule("data", n_steps=1000),
            "OfflineDataModule(n_steps=...): there is no such option. It is called 'max_updates' here.",
        ),
        (
            lambda: OfflineDataModule("data", env="CartPole-v1"),
            "OfflineDataModule(env=...): there is no such option. It is called 'evaluation' here.",
        ),
        (
            lambda: BC(train_batch_size=8),
            "BC(train_batch_size=...): there is no such option. It is called 'batch_size' here, and is an option of "
            "OfflineDataModule.",
        ),
        (
            lambda: DQN(train_batch_size=8),
            "DQN(train_batch_size=...): there is no such option. It is called 'batch_size' here, and is an option of "
            "ReplayDataModule.",
        ),
        (lambda: CQL(cql_alpha=8), "CQL(cql_alpha=...): there is no such option. It is called 'min_q_weight' here."),
        (
            lambda: PPO(vf_loss_coeff=1.0),
            "PPO(vf_loss_coeff=...): there is no such option. It is called 'value_coef' here (of half the squared "
            "error: twice the number).",
        ),
        (
            lambda: Evaluation(n_eval_episodes=3),  # type: ignore[call-arg]
            "Evaluation(n_eval_episodes=...): there is no such option. It is called 'episodes' here.",
        ),
        (
            lambda: PPO(lr=abs),
            "lr=<built-in function abs>: expected a number, above 0. Points [[env_step, value], ...] go to "
            "lr_schedule.",
        ),
        (lambda: SAC(tau=[[0, 1.0]]), "tau=[[0, 1.0]]: expected a number, above 0 and at most 1."),
    ],
)  # fmt: skip
def test_an_option_that_does_not_exist_is_refused_with_the_like_of_it(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value) == words


def test_every_hint_from_another_library_names_an_option_that_is_there() -> None:
    known = {name for owner in peers.owners(PPO) for name in options_of(owner) or {}}
    assert {name for ours in peers.OPTIONS.values() for name in ours} <= known
    assert all(name not in ours for name, ours in peers.OPTIONS.items())
    assert not [name for name in peers.CLASSES if hasattr(lit_rl, name)]
    with pytest.raises(AttributeError, match=r"no attribute 'A2C'\. PPO with num_epochs=1 and a minibatch_size"):
        lit_rl.A2C  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'RolloutDataModul'\. Did you mean 'RolloutDataModule'"):
        lit_rl.RolloutDataModul  # noqa: B018


def test_every_renamed_option_is_there_under_its_new_name() -> None:
    for cls in (PPO, RolloutDataModule, ReplayDataModule):
        options = options_of(cls) or {}
        for old, new in cls.RENAMED.items():
            name, _, field = new.partition("=")
            assert old not in options and name in options
            if field:
                assert field.removesuffix("=...)").partition("(")[2] in (options_of(options[name].annotation) or {})


@dataclass
class Tank:
    """What a tank holds.

    Attributes:
        litres: how many.
        lid: whether it has one.
    """

    litres: Count = 10
    lid: bool | None = None


class Boiler(Heater):
    @with_fields_of(Tank)
    def __init__(self, *, pressure: Positive = 1.0, **options: Any):
        self.tank = taken(Tank, options)
        super().__init__(**options)
        self.take_options()


def test_a_class_takes_the_fields_of_a_dataclass_as_its_own_options() -> None:
    boiler = Boiler(litres=3, fan=True)
    assert boiler.tank == Tank(3) and boiler.fan and not hasattr(boiler, "litres")
    assert list(options_of(Boiler) or {}) == ["pressure", "litres", "lid", "name", "power", "power_schedule", "fan"]
    with pytest.raises(OptionError, match=r"Boiler\(litre=...\): there is no such option. Did you mean 'litres'\?"):
        Boiler(litre=3)
    rest = {"litres": 5, "power": 1.0}
    assert taken(Tank, rest) == Tank(5) and rest == {"power": 1.0}


def test_replay_options_are_kept_in_one_place() -> None:
    data = ReplayDataModule("CartPole-v1", batch_size=8, n_step=[1, 3], learning_starts=8)
    assert data.replay == Replay(batch_size=8, n_step=[1, 3], learning_starts=8)
    assert data.replay.n_step == (1, 3) and not hasattr(data, "batch_size")


# --- hyper-parameters -----------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "env": CounterEnv, "num_envs_per_env_runner": 2, "rollout_length": 8, "max_env_steps": 32, "seed": 0,
}  # fmt: skip
REPLAY: dict[str, Any] = {"learning_starts": 16, "batch_size": 8, "update_to_data": 0.25, "env_steps_per_batch": 16}
# Class, options of its own and of its parents, and data.
RUNS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "PPO": (
        PPO,
        {"minibatch_size": 16, "clip_schedule": [[0, 0.2], [100, 0.1]], "gamma": 0.9, "grad_clip_by": "value"},
        RolloutDataModule,
        {},
    ),
    "Rainbow": (
        Rainbow,
        {"v_max": 20, "noisy": False, "epsilon_schedule": "cosine", "gamma": 0.9, "grad_clip_by": "norm"},
        ReplayDataModule,
        REPLAY,
    ),
    "TQC": (
        TQC,
        {"num_quantiles": 5, "critic_hidden_sizes": [8], "actor_lr": 1e-2, "gamma": 0.9, "max_grad_norm": 3},
        ReplayDataModule,
        REPLAY,
    ),
}


class Tempered(PPO):
    """Checks nothing itself."""

    def __init__(self, *, temperature: float = 1.0, lr: float = 1e-2, **options: Any):
        super().__init__(lr=lr, **options)


class Checked(Tempered):
    def __init__(self, *, share: UnitInterval = 0.5, **options: Any):
        super().__init__(**options)
        self.take_options()


def test_hyper_parameters_are_the_options_of_all_classes_and_not_the_dict_that_hands_them_on() -> None:
    names = set(options_of(PPO) or {}) - {"network", "critic_network", "policy_class", "spec"}
    assert set(PPO().hparams) == names
    tempered = Tempered(temperature=2, gamma=1)
    assert set(tempered.hparams) == names | {"temperature"}
    assert (tempered.hparams.temperature, tempered.hparams.lr, tempered.hparams.gamma) == (2, 1e-2, 1.0)
    checked = Checked(share=1, temperature=3.0)
    assert set(checked.hparams) == names | {"temperature", "share"}
    assert (checked.hparams.share, checked.hparams.temperature, checked.hparams.lr) == (1.0, 3.0, 1e-2)
    assert checked.hparams_initial == checked.hparams
    with pytest.raises(OptionError, match="share=2: expected"):
        Checked(share=2)
    rainbow = Rainbow(loss="mse").hparams
    assert (rainbow.noisy, rainbow.distributional, rainbow.loss) == (True, "categorical", "mse")


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_brings_back_options_of_a_class_and_of_its_parents(name: str, make_trainer: Any) -> None:
    cls, options, data, more = RUNS[name]
    algorithm, trainer = cls(**options), make_trainer(limit_val_batches=0)
    trainer.fit(algorithm, data(**QUICK | more))
    trainer.save_checkpoint("run.ckpt")
    restored = cls.load_from_checkpoint("run.ckpt")
    assert restored.hparams == algorithm.hparams
    assert {option: restored.hparams[option] for option in options} == options
    other = cls.load_from_checkpoint("run.ckpt", gamma=0.5)
    assert other.hparams == algorithm.hparams | {"gamma": 0.5}
    with pytest.raises(OptionError, match=r"gama=...\): there is no such option. Did you mean 'gamma'\?"):
        cls.load_from_checkpoint("run.ckpt", gama=0.5)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_line_keeps_the_same_hyper_parameters_as_python(name: str) -> None:
    cls, options, data, more = RUNS[name]
    given = {f"model.{option}": value for option, value in options.items()}
    given |= {f"data.{option}": value for option, value in (QUICK | more | {"env": "envs:CounterEnv"}).items()}
    quiet = {"trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu"}
    arguments = [f"--{option}={value}" for option, value in (given | quiet).items()]
    cli.main(["fit", f"--model={cls.__name__}", f"--data={data.__name__}", *arguments])
    (path,) = Path().rglob("*.ckpt")
    restored = cls.load_from_checkpoint(path)
    assert restored.hparams == cls(**options).hparams
    assert torch.load(path, weights_only=True)["hyper_parameters"].keys() == {*restored.hparams, "spec", *cls.NETWORKS}


# --- the command line -----------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The last line of a command that is refused."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", *args, "--trainer.logger=false"])
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("lit-rl: error: ")


@pytest.mark.parametrize(
    ("model", "argument", "words"),
    [
        ("PPO", "--data.eval_episodes=3", "It is called evaluation.episodes now."),
        ("PPO", "--data.eval_env_kwargs={n: 1}", "It is called evaluation.env_kwargs now."),
        ("PPO", "--data.num_eval_env_runners=3", "It is called evaluation.num_env_runners now."),
        ("PPO", "--data.evaluation.episods=3", "Did you mean 'episodes'?"),
        ("PPO", "--data.fault_tolerance.max_restarst=3", "Did you mean 'max_restarts'?"),
        ("PPO", "--data.evaluation.episodes=0", "evaluation.episodes=0: expected a whole number of at least 1."),
        ("PPO", "--data.evaluation=null", "data.evaluation=None: expected a dict of episodes, deterministic,"),
        ("PPO", "--model.entropy_schedule=linear", "It is called entropy_coef_schedule now."),
        ("PPO", "--model.clip_schedule=sine", "clip_schedule='sine': expected 'constant', 'linear', 'cosine' or [["),
        (
            "DQN", "--model.epsilon=[[0, 1.0], [9, 0.1]]",
            "epsilon=[[0, 1.0], [9, 0.1]]: expected a number. Points [[env_step, value], ...] go to epsilon_schedule.",
        ),
        ("PPO", "--data.replay.batch_sise=3", "Did you mean 'batch_size'?"),
        ("PPO", "--data.replay.one.batch_sise=3", "replay.one.batch_sise: there is no option 'batch_sise'. Did you"),
        ("PPO", "--data.replay={batch_sise: 3}", "replay: there is no option 'batch_sise'. Did you mean 'batch_size'?"),
        ("PPO", "--data.evaluation={episods: 3}", "Did you mean 'episodes'?"),
        ("DQN", "--data.bufer_size=3", "Did you mean 'buffer_size'?"),
        ("DQN", "--data.replay.batch_size=3", "Did you mean 'batch_size'?"),
        ("DQN", "--data.priority_alpha=2", "priority_alpha=2.0: expected a number, at least 0 and at most 1."),
        ("TQC", "--model.gama=0.9", "Did you mean 'gamma'?"),
        ("TQC", "--model.gamma=1.9", "gamma=1.9: expected a number, at least 0 and at most 1."),
    ],
)  # fmt: skip
def test_the_command_line_answers_with_the_same_hints(
    model: str, argument: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    data = "RolloutDataModule" if model == "PPO" else "ReplayDataModule"
    found = answer(
        capsys, f"--model={model}", f"--data={data}", "--data.env=CartPole-v1", "--data.max_env_steps=64", argument
    )
    assert words in found


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("PPO", "RolloutDataModule, init_args: {env: CartPole-v1, eval_episodes: 3}", "called evaluation.episodes now"),
        (
            "PPO", "RolloutDataModule, init_args: {env: CartPole-v1, eval_parallel: true}",
            "data: Option 'eval_parallel' is not accepted. It is called evaluation.parallel now.",
        ),
        (
            "PPO", "RolloutDataModule, init_args: {env: CartPole-v1, evaluation: {episods: 3}}",
            "Group 'evaluation' does not accept option 'episods'. Did you mean 'episodes'?",
        ),
        (
            "PPO", "RolloutDataModule, init_args: {env: CartPole-v1, max_env_steps: 64, placement: null}",
            "data.placement=None: expected a dict of num_cpus, resources, strategy. Leave it out for the defaults.",
        ),
        (
            "PPO, init_args: {entropy_schedule: linear}", "RolloutDataModule, init_args: {env: CartPole-v1}",
            "Option 'entropy_schedule' is not accepted. It is called entropy_coef_schedule now.",
        ),
        (
            "DQN, init_args: {epsilon: [[0, 1.0], [9, 0.1]]}", "ReplayDataModule, init_args: {env: CartPole-v1}",
            "epsilon=[[0, 1.0], [9, 0.1]]: expected a number. Points [[env_step, value], ...] go to epsilon_schedule.",
        ),
    ],
)  # fmt: skip
def test_a_config_is_answered_with_the_same_hints(
    model: str, data: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    Path("old.yaml").write_text(f"model: {{class_path: {model}}}\ndata: {{class_path: {data}}}\n")
    assert words in answer(capsys, "--config=old.yaml")


def help_of(*args: str) -> str:
    """What `--help` prints, on one line."""
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        cli.main(["fit", *args])
    return " ".join(output.getvalue().split())


@pytest.mark.parametrize(
    ("args", "lines"),
    [
        (
            ["--model.help", "PPO"],
            [
                "--model.gamma GAMMA discount per env step; 0.9 to 0.999. (type: Annotated[float, a number, at least 0 "
                "and at most 1], default: 0.99)",
                "(type: Annotated[str, one of 'global_norm', 'norm', 'value'], default: global_norm)",  # the parent's
                "(type: Optional[Annotated[float, a number, above 0]], default: 0.5)",
                "'linear', 'cosine' or [[env_step, value], ...]], default: constant)",
            ],
        ),
        (
            ["--model.help", "TQC"],
            [
                "quantiles (Z) of each critic. (type: Annotated[int, a whole number of at least 1], default: 25)",
                "--model.tau TAU how far the target critics move to the critics after every update. (type: "
                "Annotated[float, a number, above 0 and at most 1], default: 0.005)",
                "--model.gamma GAMMA discount per env step; 0.9 to 0.999. (type: Annotated[float, a number, at least 0 "
                "and at most 1], default: 0.99)",
                "a number, finite, or 'auto'], default: auto)",
            ],
        ),
        (
            ["--data.help", "ReplayDataModule"],
            [
                "--data.batch_size BATCH_SIZE transitions per gradient update and learner process.",
                "a whole number, or [low, high]]], default: null)",
                "--data.reward_scale REWARD_SCALE rewards are multiplied by it before the learner sees them.",
                "--data.evaluation.episodes EPISODES whole episodes of all learner processes together, each with the "
                "same seed every time. (type: Annotated[int, a whole number of at least 1], default: 10)",
                "--data.placement.num_cpus NUM_CPUS CPUs of the node it runs on. (type: Annotated[float, a number, at "
                "least 0], default: 0.0)",
                "--data.fault_tolerance.step_timeout_s STEP_TIMEOUT_S seconds for one step",
            ],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value[0], str) and len(value) == 2 else "",
)
def test_help_shows_ranges_and_docs_also_of_parents_and_dataclasses(args: list[str], lines: list[str]) -> None:
    found = help_of(*args)
    assert [line for line in lines if line not in found] == []


@pytest.mark.parametrize("cls", [PPO, DQN, Rainbow, SAC, TQC, RolloutDataModule, ReplayDataModule])
def test_every_option_is_explained_on_the_command_line(cls: type) -> None:
    kind = "data" if issubclass(cls, (RolloutDataModule, ReplayDataModule)) else "model"
    found = help_of(f"--{kind}.help", cls.__name__)
    for name, option in (options_of(cls) or {}).items():
        fields = (
            options_of(option.annotation)
            if isinstance(option.default, (Evaluation, Placement, FaultTolerance))
            else None
        )
        for option_name in [f"{name}.{field}" for field in fields] if fields else [name]:
            metavar = option_name.rpartition(".")[2].upper()
            assert f"--{kind}.{option_name} " in found
            assert f"--{kind}.{option_name} {metavar} (" not in found, f"{option_name} has no explanation"
