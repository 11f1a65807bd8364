"""The console script `lit-rl`: LightningCLI over the algorithms and datamodules, with one-sentence errors."""

import datetime
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import lit_rl
import lit_rl.callbacks
import lit_rl.datamodules
import lit_rl.modules  # so that short class names such as PPO are found
import lit_rl.multi_agent
from lit_rl.algorithm import Algorithm
from lit_rl.callbacks import EnvStepsProgressBar, Record
from lit_rl.cli.cluster import Cluster, last_reported, run_learners, trainer_arguments
from lit_rl.cli.configs import check_config, check_groups, own_names_first
from lit_rl.cli.quiet import LIGHTNING_LOGGERS, quieten
from lit_rl.cli.recipe_index import recipe_files
from lit_rl.cli.shared import OF_LIGHTNING, SUBCOMMANDS, import_from_folder
from lit_rl.errors import CheckpointError, OptionError, did_you_mean
from lit_rl.files import rescue
from lit_rl.files.loading import read_first, whole_checkpoint
from lit_rl.learner.reporting import telling
from lit_rl.source import Source, source_of

DEFAULTS = {
    "max_epochs": -1,  # the budget is data.max_env_steps, or data.max_updates
    "log_every_n_steps": 1,  # one batch is one rollout
    "num_sanity_val_steps": 0,
}


class CLI(LightningCLI):
    """`lit-rl fit|validate|test|predict`."""

    def __init__(self, *args: Any, **options: Any):
        given = options["args"]
        if isinstance(given, list) and given and given[0] in OF_LIGHTNING:  # four parsers take four times as long
            only = {given[0]: self.subcommands()[given[0]]}
            self.subcommands = lambda: only  # type: ignore[method-assign]
        super().__init__(*args, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="start from this checkpoint's weights and normaliser alone (optimizer, counters and RNGs are new)",
        )
        parser.add_class_arguments(Cluster, "cluster")  # a config with it is also evaluated, in one process

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--out", type=str | None, default=None, help="write the episodes here, not into the run's folder"
            )
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning would merge the checkpoint's hyper-parameters into the config: here the config says what is run."""

    def _set_seed(self) -> None:
        config = self.config[self.subcommand]
        launched = {"PL_GLOBAL_SEED", "RANK", "SLURM_PROCID"} & os.environ.keys()  # with others, whose seed is the same
        if self.subcommand == "fit" and config.seed_everything is True and not launched:
            config.seed_everything = int(np.random.SeedSequence().generate_state(1)[0])
            print(f"No seed was given: --seed_everything {config.seed_everything}")
        super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.progress_bar_callback is not None:
            own = EnvStepsProgressBar()
            trainer.callbacks[trainer.callbacks.index(trainer.progress_bar_callback)] = own  # type: ignore[attr-defined]
        if self.subcommand == "predict":
            recording = [c for c in trainer.callbacks if isinstance(c, Record)]  # type: ignore[attr-defined]
            if not recording:
                recording = [Record()]
                trainer.callbacks += recording  # type: ignore[attr-defined]
            if self.config.predict.out is not None:
                recording[0].folder = self.config.predict.out
        return trainer

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_groups("data", config.data)
        for option in ("ckpt_path", "init_from"):  # a missing or damaged file is refused before anything starts
            path = config.get(option)
            if (option, path) == ("ckpt_path", "last"):
                config[option] = str(newest_checkpoint(config.trainer))
            elif path is not None:
                config[option] = str(whole_checkpoint(path))
        if config.get("ckpt_path") and config.get("init_from"):
            raise OptionError(
                f"init_from={config.init_from!r} together with ckpt_path={config.ckpt_path!r}: expected one of them. "
                "ckpt_path goes on with a run, init_from starts a new one from its weights."
            )
        if self.subcommand == "fit":
            _check_budget(config)
            if config.cluster.num_learners is not None:
                _check_cluster(config)
        elif config.get("ckpt_path") is None:
            raise OptionError(f"lit-rl {self.subcommand} needs --ckpt_path: a checkpoint file, or 'last'.")

    @property
    def _asks_for_learners(self) -> bool:
        return self.subcommand == "fit" and self.config.fit.cluster.num_learners is not None

    def instantiate_classes(self) -> None:
        if self._asks_for_learners:  # each makes its own: here it is seen, before Ray starts, that they can be made
            self.config_init = self.parser.instantiate_classes(self.config)
        else:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if self._asks_for_learners:
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            print(run_learners(self.config_init.fit.cluster, _learn, config | {"folder": os.getcwd()}))
        else:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        if self.config_init.fit.get("init_from") is not None:  # else it may be an option of the model's own
            self.model.init_from = self.config_init.fit.init_from
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and self.trainer.is_global_zero:
                clock = self.datamodule.clock if isinstance(self.datamodule, Source) else "env_steps"
                logger.experiment.define_metric("*", step_metric=clock)
        self._started = time.perf_counter()

    def after_fit(self) -> None:
        """One line on what came of the run."""
        trainer, algorithm = self.trainer, self.model
        if not trainer.is_global_zero or trainer.interrupted or not isinstance(algorithm, Algorithm):
            return
        taken = datetime.timedelta(seconds=round(time.perf_counter() - self._started))
        shares = ", ".join(f"{name} {share:.0%}" for name, share in algorithm.time_shares().items())
        said = _so_far(trainer, algorithm)
        said[0] += f" in {taken}"
        if shares:
            said[0] += f" ({shares})"
        paths = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
        if saved := [Path(path) for path in paths if path]:
            said.append(f"checkpoint {os.path.relpath(max(saved, key=lambda path: path.stat().st_mtime))}")
        print(f"Done: {', '.join(said)}")


def _so_far(trainer: L.Trainer, algorithm: Algorithm) -> list[str]:
    """How long a run has learned, and the few metrics that say how good it is."""
    metrics = [f"{name} {value:.4g}" for name, value in telling(trainer.callback_metrics).items()]
    return [f"{algorithm.clock:,} {source_of(trainer).clock.replace('_', ' ')}", *metrics]


class EpochLines(L.Callback):
    """A line after each epoch, where there is no progress bar."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, Algorithm):
            print(", ".join(_so_far(trainer, pl_module)))


class LearnerCLI(CLI):
    """`lit-rl fit` in a process that Ray Train started."""

    _asks_for_learners = False

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        from ray.train.lightning import RayTrainReportCallback, prepare_trainer

        fit = self.config_init.fit
        own = trainer_arguments(fit.cluster, fit.trainer.get("plugins"))
        trainer = super().instantiate_trainer(enable_progress_bar=False, **own, **kwargs)
        trainer.callbacks += [RayTrainReportCallback(), EpochLines()]  # type: ignore[attr-defined]
        return prepare_trainer(trainer)


def _learn(config: dict[str, Any]) -> OptionError | None:
    """A learner's whole run. What no restart mends is returned, so that Ray Train tries none."""
    quieten()
    for name in LIGHTNING_LOGGERS:  # Ray Train's handler at the root would print each line once more
        logging.getLogger(name).propagate = False
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):  # not its files: each report of an epoch has all metrics
            handler.setLevel(logging.WARNING)
    folder = config.pop("folder")
    if os.path.isdir(folder):
        os.chdir(folder)  # relative paths are those of the command
        import_from_folder()
    with last_reported() as checkpoint:
        if checkpoint is not None:
            config["fit"] |= {"ckpt_path": str(checkpoint), "init_from": None}
        try:
            _run(LearnerCLI, config)
        except OptionError as error:
            return error
    return None


class SaveConfig(SaveConfigCallback):
    """Saves the run's config beside its log, and in W&B's; a run that logs nothing leaves no file."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers and not self.already_saved:
            self._folder = rescue.log_folder(trainer)  # every rank asks
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = str(self._folder / self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": yaml.safe_load(self.parser.dump(self.config, skip_none=False))})


def newest_checkpoint(trainer: Any) -> Path:
    """The newest whole checkpoint among the runs that log to where this one will.

    Raises:
        CheckpointError: if there is none.
    """
    folders = []
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        arguments = getattr(logger, "init_args", None)
        if arguments is not None:
            # W&B's logger names its folder after the project, not after the run.
            name = arguments.get("project" if "project" in arguments else "name")
            folders.append(Path(arguments.get("save_dir") or ".") / (name or "lightning_logs"))
    folders = folders or [Path(trainer.default_root_dir or ".") / "lightning_logs"]
    found = [path for folder in folders for name in ("*.ckpt", "*.ckpt.previous") for path in folder.rglob(name)]
    if not found:
        raise CheckpointError(
            f"ckpt_path='last': found no *.ckpt below {', '.join(map(str, folders))}. Give the checkpoint's own path."
        )
    return read_first(sorted(found, key=lambda path: path.stat().st_mtime, reverse=True))[0]


def recipe_path(name: str) -> str:
    """The file a `--config` value means: a path that exists, or a packaged recipe's name.

    Raises:
        OptionError: if it is neither, or a file that is no config.
    """
    if Path(name).is_file():
        check_config(name)
        return name
    recipes = recipe_files()
    if name in recipes:
        return str(recipes[name])
    said = did_you_mean(name, recipes) or " `lit-rl recipes` lists them."
    raise OptionError(f"config={name!r}: expected a YAML file or a recipe's name.{said}")


def _check_order(args: Sequence[str]) -> None:
    """Refuse an option before the subcommand, but for a config that has the subcommands' own options.

    Raises:
        OptionError: with the order that is meant.
    """
    at = next((i for i, argument in enumerate(args) if argument in SUBCOMMANDS), 0)
    early = [argument for argument in args[:at] if argument.startswith("-")]
    if not early or early[0] in ("-h", "--help", "--version"):
        return
    option, _, value = early[0].partition("=")
    if option in ("-c", "--config"):
        path = Path(value or args[args.index(early[0]) + 1])
        if path.is_file() and set(SUBCOMMANDS) & set(yaml.safe_load(path.read_bytes()) or ()):
            return
    raise OptionError(
        f"{option} before {args[at]!r}: expected the subcommand first, as in lit-rl {args[at]} --config ppo_cartpole."
    )


def _resolve_recipes(args: Sequence[str]) -> list[str]:
    resolved = list(args)
    for i, argument in enumerate(resolved):
        if argument in ("--config", "-c") and i + 1 < len(resolved):
            resolved[i + 1] = recipe_path(resolved[i + 1])
        elif argument.startswith("--config="):
            resolved[i] = f"--config={recipe_path(argument.removeprefix('--config='))}"
    return resolved


def _check_budget(config: Any) -> None:
    trainer, data = config.trainer, config.data.get("init_args", {})
    bounded = (trainer.max_epochs or -1) > -1 or (trainer.max_steps or -1) > -1 or trainer.max_time is not None
    budget = "max_updates" if "max_updates" in data else "max_env_steps"
    if not bounded and not trainer.fast_dev_run and data.get(budget, 0) is None:
        raise OptionError(
            f"The run has no end: set data.{budget} (or trainer.max_time, trainer.max_epochs, trainer.max_steps)."
        )


def _check_cluster(config: Any) -> None:
    trainer, data, cluster = config.trainer, config.data.get("init_args", {}), config.cluster
    for option, expected in (("strategy", "auto"), ("num_nodes", 1)):
        if trainer.get(option) != expected:
            raise OptionError(
                f"trainer.{option}={trainer.get(option)!r} together with cluster.num_learners={cluster.num_learners}: "
                "Ray Train places the learners. Leave one of them out."
            )
    if cluster.ray_address is None:
        cluster.ray_address = data.get("ray_address")
    elif data.get("ray_address") not in (None, cluster.ray_address):
        raise OptionError(
            f"cluster.ray_address={cluster.ray_address!r} and data.ray_address={data.get('ray_address')!r}: expected "
            "one address. Leave one of them out."
        )


def run(arguments: Sequence[str]) -> None:
    """`lit-rl fit|validate|test|predict`."""
    quieten()  # once more, since Lightning was imported
    _check_order(arguments)
    _run(CLI, _resolve_recipes(arguments))


def _run(cli: type[CLI], args: list[str] | dict[str, Any]) -> None:
    with own_names_first():
        cli(
            Algorithm,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=DEFAULTS,
            seed_everything_default=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "version": lit_rl.__version__,
                "prog": "lit-rl",
            },
            args=args,
        )
