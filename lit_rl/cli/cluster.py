"""Learners as Ray Train workers: `lit-rl fit --cluster.num_learners 2`. Ray is imported when they are asked for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from lit_rl.errors import LitRLError, OptionError, RunnerError
from lit_rl.options import Count, CountOrZero, OptionFields, Positive, Within, check_fields

KEPT = 2  # checkpoints of a run that Ray Train keeps


@dataclass(frozen=True)
class Cluster(OptionFields):
    """`fit` on learners that Ray Train places, restarts and keeps the checkpoints of.

    Attributes:
        num_learners: processes that learn, on any nodes of the Ray cluster; None: this process learns, without Ray.
        gpus_per_learner: whole GPUs; 0 learns on the CPU, whatever `trainer.accelerator` says.
        cpus_per_learner: what Ray reserves for a learner. Env runners reserve what `data.placement` says beside that.
        max_failures: times that all learners begin again from the last reported checkpoint after one was lost or
            raised; -1 for ever. A node that its cloud takes back with notice is not counted.
        storage_path: folder or URI of reported checkpoints, one after each epoch. With several nodes all must see it.
            None is Ray's own, ~/ray_results.
        ray_address: of a running Ray; None is `data.ray_address`, the variable RAY_ADDRESS, or a new Ray on this
            machine.
    """

    num_learners: Count | None = None
    gpus_per_learner: CountOrZero = 0
    cpus_per_learner: Positive = 1.0
    max_failures: Annotated[int, Within(-1, whole=True)] = 0
    storage_path: str | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "cluster.")


def run_learners(cluster: Cluster, learn: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> str:
    """Run `learn(config)` in every learner; returns where the last checkpoint is, in one sentence.

    Args:
        learn: an importable function. What it returns in the first learner is raised here, if it is an error.
        config: plain data.

    Raises:
        RunnerError: if Ray cannot be joined or lacks what the learners reserve, or if they failed too often.
    """
    if find_spec("pandas") is None:  # asked before `import ray`, for which the session sets what it needs
        raise OptionError(
            f"cluster.num_learners={cluster.num_learners} needs Ray Train, whose pandas is missing. Install "
            "lit-rl[cluster]."
        )
    from lit_rl.runners import ray_session

    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # what a learner prints is logged, without it once more
    ray_session.connect(cluster.ray_address)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    resources = {"CPU": cluster.cpus_per_learner, "GPU": float(cluster.gpus_per_learner)}
    if not (cluster.ray_address or os.environ.get("RAY_ADDRESS")):
        _check_resources(cluster, resources, ray.cluster_resources())
    storage = cluster.storage_path
    trainer = TorchTrainer(
        learn,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_learners or 1,
            use_gpu=cluster.gpus_per_learner > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=RunConfig(
            storage_path=storage if storage is None or "://" in storage else os.path.abspath(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        raise _in_one_sentence(error, cluster.max_failures) from error
    returned = result.return_value  # type: ignore[attr-defined] # mypy sees the Result of Ray Train's first version
    if isinstance(returned, Exception):
        raise returned
    if result.checkpoint is None:
        return f"No epoch ended, so there is no checkpoint. What Ray Train wrote is in {result.path}"
    return f"The last checkpoint is {_file(result.checkpoint.path)}"


def trainer_arguments(cluster: Cluster, plugins: Any) -> dict[str, Any]:
    """In a learner: the Trainer arguments that Ray Train decides; the configured `plugins` are kept."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    plugins = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    return {
        "strategy": RayDDPStrategy(),
        "plugins": [*plugins, RayLightningEnvironment()],
        "accelerator": "gpu" if cluster.gpus_per_learner else "cpu",
        "devices": "auto" if cluster.gpus_per_learner else 1,
        "num_nodes": 1,
    }


@contextmanager
def last_reported() -> Iterator[Path | None]:
    """In a learner: the checkpoint from which Ray Train has it go on; None at the beginning of the run."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield _file(folder)


def _file(folder: str) -> Path:
    from ray.train.lightning import RayTrainReportCallback

    return Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME


def _check_resources(cluster: Cluster, wanted: dict[str, float], there: dict[str, float]) -> None:
    """Ray Train would wait for ever for what this machine does not have."""
    for name, amount in wanted.items():
        total = amount * (cluster.num_learners or 1)
        if total > there.get(name, 0.0):
            raise OptionError(
                f"cluster.num_learners={cluster.num_learners} with {name.lower()}s_per_learner={amount:g}: expected "
                f"{total:g} {name}s, this machine has {there.get(name, 0.0):g}. Ask for less, or join a cluster with "
                "ray_address."
            )


def _in_one_sentence(error: Any, max_failures: int) -> Exception:
    """What ended the run: the learners' own errors, or that one was lost; a bug keeps Ray Train's report of it."""
    # What a learner raised is wrapped, and only there is it still an exception.
    raised = {rank: getattr(e, "_base_exc", None) for rank, e in error.worker_failures.items()}
    own = {str(e): e for e in raised.values() if isinstance(e, LitRLError)}
    if len(own) == 1:
        return next(iter(own.values()))
    if own:
        return RunnerError(" ".join(own))
    lost = [rank for rank, e in raised.items() if e is None]
    if not lost:
        return error
    why = " ".join(str(error.worker_failures[lost[0]]).split())
    return RunnerError(
        f"Learner {lost[0]} was lost, after max_failures={max_failures} restarts: {why.rstrip('.')}. Raise "
        "cluster.max_failures, or go on with --ckpt_path."
    )
