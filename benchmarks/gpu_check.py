"""What lit_rl does on a GPU: the `gpu` tests, then PPO, SAC and DQN timed there and on the CPU, eager and compiled.

    bash benchmarks/gpu_wheels.sh                             # where there is a network
    bash benchmarks/gpu_check.sh OUT                          # on the GPU machine: a table, and OUT/gpu_check.json
    bash benchmarks/gpu_check.sh OUT --device cpu --short     # all of it in small, without a GPU

Everything ends within `LIMIT_S`. Each case is a process of its own with a limit; in small one has them all. A form that
raises, or that the limit left no time for, is a row with the error, and the others go on; the exit status is then 1.
Compiled forms are compiled once while the tests run, so that they come from the compiler's cache when they are timed;
`compilation_s` is what is left of it then.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/core/test_gpu.py"
LIMIT_S, TESTS_LIMIT_S, CASE_LIMIT_S = 450.0, 200.0, 100.0  # of all, of the tests, of a case (not by `--short`)
TIMED_S = {False: 4.0, True: 0.2}  # of each form, by `--short`
SYNCHRONISES = "called a synchronizing CUDA operation"
COLUMNS = {
    "env_steps_per_s": "env steps/s",
    "updates_per_s": "updates/s",
    "gradient_steps_per_s": "gradient steps/s",
    "learner_share": "learner's share",
    "memory_mb": "GPU memory, MB",
    "waits_per_gradient_step": "waits/gradient step",
    "compilation_s": "compilation, s",
}


class Frames(VectorEnv):
    """Pictures of noise that cost nothing to make, in episodes of 200 steps; the reward is 1 for action 0."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.single_action_space = spaces.Discrete(6)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._frames = np.random.default_rng(0).integers(0, 256, (16 + num_envs, 84, 84, 4), np.uint8)
        self._t = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self._t = 0
        return self._frames[: self.num_envs].copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self._t += 1
        first, ended = self._t % 16, np.full(self.num_envs, self._t % 200 == 0)
        obs = self._frames[first : first + self.num_envs].copy()
        return obs, (actions == 0).astype(np.float64), ended, np.zeros_like(ended), {}


class Body(gym.Env):
    """As many numbers as HalfCheetah has, moved by a matrix, in episodes of 1000 steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (17,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (6,), np.float32)
        self._matrix = np.random.default_rng(0).normal(0, 0.2, (23, 17)).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._t, self._obs = 0, self.np_random.normal(0, 0.1, 17).astype(np.float32)
        return self._obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._t += 1
        self._obs = np.tanh(np.concatenate([self._obs, action]) @ self._matrix)
        return self._obs, float(self._obs[0]), False, self._t == 1000, {}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        make: algorithm and datamodule; given whether the update is compiled, and whether all is small.
        forms: how its update is taken: "eager", "compiled", or "bf16" (eager, in mixed precision).
        warm_up: Lightning batches before time is taken.
    """

    make: Callable[[bool, bool], tuple[Any, Any]]
    forms: tuple[str, ...] = ("eager", "compiled")
    warm_up: int = 3


def ppo(env: Any, num_envs: int, length: int, minibatch: int, compile: bool, short: bool, **options: Any) -> Any:
    from lit_rl import PPO, RolloutDataModule

    if short:
        length, minibatch = length // 8, minibatch // 8
    data = RolloutDataModule(env, num_envs_per_env_runner=num_envs, rollout_length=length, seed=0, **options)
    return PPO(lr=2.5e-4, num_epochs=1 if short else 4, minibatch_size=minibatch, compile=compile), data


def off_policy(compile: bool, short: bool, continuous: bool) -> Any:
    from lit_rl import DQN, SAC, ReplayDataModule

    options: dict[str, Any] = {"buffer_size": 100_000, "learning_starts": 64 if short else 500, "seed": 0}
    batch = 20 if short else 100  # env steps
    if continuous:  # one update per env step
        data = ReplayDataModule(Body, batch_size=32 if short else 256, env_steps_per_batch=batch, **options)
        return SAC(compile=compile), data
    data = ReplayDataModule(
        "CartPole-v1", batch_size=64, rollout_length=4, update_to_data=0.25, env_steps_per_batch=4 * batch, **options
    )
    return DQN(lr=1e-3, compile=compile), data


CASES = {
    "PPO CartPole, 8 envs": Case(functools.partial(ppo, "CartPole-v1", 8, 128, 256)),
    "PPO CartPole, 64 native envs": Case(functools.partial(ppo, "CartPole-v1", 64, 64, 1024, vectorization="native")),
    "PPO 84x84x4 pictures, 8 envs": Case(
        functools.partial(ppo, Frames, 8, 128, 256, vectorization="native"), ("eager", "bf16", "compiled"), warm_up=1
    ),
    "SAC 17 numbers, 6 actions": Case(functools.partial(off_policy, continuous=True), warm_up=8),
    "DQN CartPole": Case(functools.partial(off_policy, continuous=False), warm_up=4),
}
COMPILED_IN_SHORT = "DQN CartPole"


# --- one process: the forms of a case ---------------------------------------------------------------------------


def measure(case: Case, form: str, device: str, short: bool, timed_s: float) -> dict[str, float]:
    """Train for `timed_s` after the warm-up; on a GPU, then count the host's waits for it during one more batch."""
    import lightning as L
    import torch

    class Clock(L.Callback):
        batches, update_s, compilation_s, ended = 0, 0.0, 0.0, 0.0
        started = counts = done = None

        def read(self, trainer: L.Trainer, algorithm: Any) -> tuple[int, int, int]:
            if device == "cuda":
                torch.cuda.synchronize()
            return algorithm.env_steps_done, algorithm.updates_done, trainer.global_step

        def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *_: object) -> None:
            now, update_s = time.perf_counter(), float(trainer.callback_metrics["time/update_s"])
            self.batches += 1
            if self.done:
                waits.close()
                trainer.should_stop = True
            elif self.batches <= case.warm_up:
                self.compilation_s = max(self.compilation_s, update_s)  # the batch in which it happens
                self.counts, self.started = self.read(trainer, algorithm), time.perf_counter()
            else:
                self.update_s += update_s
                if now - self.started >= timed_s:
                    self.done, self.ended = self.read(trainer, algorithm), time.perf_counter()
                    self.memory = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
                    if device == "cuda":
                        self.seen = waits.enter_context(host_waits())
                    else:
                        trainer.should_stop = True

    waits, clock = contextlib.ExitStack(), Clock()
    algorithm, data = case.make(form == "compiled", short)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
        precision="bf16-mixed" if form == "bf16" else "32-true",
    )  # fmt: skip
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with waits:
        trainer.fit(algorithm, data)
    seconds, batches = clock.ended - clock.started, clock.batches - case.warm_up - (device == "cuda")
    env_steps, updates, steps = (new - old for new, old in zip(clock.done, clock.counts))
    result = {
        "env_steps_per_s": env_steps / seconds,
        "updates_per_s": updates / seconds,
        "gradient_steps_per_s": steps / seconds,
        "learner_share": clock.update_s / seconds,
    }
    if device == "cuda":
        result["memory_mb"] = clock.memory
        result["waits_per_gradient_step"] = len(clock.seen) / max(1, trainer.global_step - clock.done[2])
    if form == "compiled":
        result["compilation_s"] = clock.compilation_s - clock.update_s / batches
    return result


@contextlib.contextmanager
def host_waits() -> Any:
    """The operations inside for which the host waited for the GPU, one entry each."""
    import torch

    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: SYNCHRONISES in str(message) and found.append(str(message))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run_forms(name: str, forms: Sequence[str], device: str, short: bool, warm: bool) -> None:
    """Print a line of JSON for each form of a case."""
    warnings.filterwarnings("ignore")
    for form in forms:
        try:
            result: dict[str, Any] = measure(CASES[name], form, device, short, 0.0 if warm else TIMED_S[short])
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print("RESULT " + json.dumps({"case": name, "form": form} | result), flush=True)
        gc.collect()


# --- the process that starts the others -------------------------------------------------------------------------


class Check:
    """Runs everything within `LIMIT_S`, and keeps what was found in OUT/gpu_check.json.

    Args:
        out: folder for `gpu_check.json`, the tests' output and what the cases printed.
        device: "cuda", with the CPU for comparison, or "cpu" alone.
        short: whether all is small.
    """

    def __init__(self, out: Path, device: str, short: bool):
        self.out, self.device, self.short = out, device, short
        self.started = time.monotonic()
        self.found: dict[str, Any] = {"machine": describe_machine(device), "short": short, "tests": {}, "rows": []}
        self.found["compilation_beside_tests_s"] = {}
        self.log = (out / "gpu_check.log").open("w")
        self.lock = threading.Lock()  # of what was found, to which several threads add

    @property
    def left_s(self) -> float:
        return LIMIT_S - (time.monotonic() - self.started)

    def forms(self, name: str, device: str) -> list[str]:
        """Those of a case that are run: in short one case alone is compiled, beside a GPU no CPU has bf16."""
        left_out = set()
        if self.short and name != COMPILED_IN_SHORT:
            left_out.add("compiled")
        if device != self.device:
            left_out.add("bf16")
        return [form for form in CASES[name].forms if form not in left_out]

    def run(self, command: Sequence[str], limit_s: float, **environment: str) -> tuple[str, str | None]:
        """What a process with its children printed, and how it failed, if it did: its exit status, or the limit."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | environment,
            )  # fmt: skip
            limit_s = max(0.0, min(limit_s, self.left_s))
            try:
                status = process.wait(limit_s)
                failed = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                failed = f"not done within {limit_s:.0f} s"
            with contextlib.suppress(ProcessLookupError):  # those that it started too, as the compiler does
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            return output.read(), failed

    def cases(self, names: Sequence[str], device: str, threads: int) -> None:
        """Time cases in one process, and add their rows."""
        forms = {name: self.forms(name, device) for name in names}
        command = [__file__, str(self.out), "--run", json.dumps(forms), "--device", device]
        if self.left_s < 10:
            output, failed = "", f"no time was left of {LIMIT_S:.0f} s"
        else:
            command += ["--short"] * self.short
            limit_s = LIMIT_S if self.short else CASE_LIMIT_S
            output, failed = self.run(command, limit_s, OMP_NUM_THREADS=str(threads))
        results = results_in(output)
        rows = [
            {"case": name, "form": form, "device": device} | results.get((name, form), {"error": failed})
            for name in names
            for form in forms[name]
        ]
        with self.lock:
            self.found["rows"] += rows
            self.log.write(f"=== {', '.join(names)}, {device}: {failed or 'done'}\n{output}\n")
            self.write()

    def warm(self, name: str) -> None:
        """Have a case's compiled form compiled, for the compiler's cache, and keep how long it took."""
        forms = json.dumps({name: ["compiled"]})
        command = [__file__, str(self.out), "--run", forms, "--device", self.device, "--warm"]
        output, failed = self.run(command, TESTS_LIMIT_S)
        with self.lock:
            for result in results_in(output).values():
                self.found["compilation_beside_tests_s"][name] = result.get("compilation_s")
            self.log.write(f"=== compilation of {name}: {failed or 'done'}\n{output}\n")

    def tests(self, part: str) -> None:
        """Run the tests whose names have or have not a word in them, which is what `part` says, and count."""
        # Those without a GPU are tests like any other: one of them shows that they are found.
        if self.device == "cuda":
            chosen = ["-m", "gpu", "-k", part]
        else:
            chosen = ["-m", "not gpu", "-k", "priorities"]
        command = ["-m", "pytest", TESTS, "-v", "-p", "no:cacheprovider", *chosen]
        output, failed = self.run(command, TESTS_LIMIT_S)
        (self.out / f"tests_{part.replace(' ', '_')}.txt").write_text(output)
        outcomes = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE)
        counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
        for _, outcome in outcomes:
            counts["failed" if outcome == "ERROR" else outcome.lower()] += 1
        counts["failures"] = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
        if failed or not counts["passed"]:
            counts["error"] = failed or "no test passed"
        with self.lock:
            self.found["tests"][part] = counts
            self.write()

    def write(self) -> None:
        self.found["took_s"] = round(time.monotonic() - self.started, 1)
        (self.out / "gpu_check.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def __call__(self) -> bool:
        """Run it all; whether all went well."""
        cores = os.cpu_count() or 1
        on_gpu = self.device == "cuda"
        with ThreadPoolExecutor(max(3, cores // 4) if on_gpu else 1) as pool:
            jobs = [pool.submit(self.tests, part) for part in (["not compiled", "compiled"] if on_gpu else ["all"])]
            if on_gpu:
                jobs += [pool.submit(self.warm, name) for name in CASES]
        groups = [list(CASES)] if self.short else [[name] for name in CASES]
        if on_gpu:  # alone
            for names in groups:
                self.cases(names, "cuda", threads=max(1, cores // 2))
        at_once = 1 if self.short else max(1, cores // 4)
        threads = 1 if self.short else max(1, cores // at_once)
        with ThreadPoolExecutor(at_once) as pool:
            jobs += [pool.submit(self.cases, names, "cpu", threads) for names in groups]
        for job in jobs:
            job.result()
        order = list(CASES)
        self.found["rows"].sort(key=lambda row: order.index(row["case"]))
        self.write()
        return not any("error" in row for row in [*self.found["rows"], *self.found["tests"].values()])


def results_in(output: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What `run_forms` printed, by case and form."""
    printed = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    return {(result.pop("case"), result.pop("form")): result for result in map(json.loads, printed)}


def describe_machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {"python": platform.python_version(), "cpu_cores": os.cpu_count()}
    if device == "cuda":
        import torch

        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine | {name: version(name) for name in ("torch", "lightning", "tensordict", "gymnasium", "numpy")}


def table(found: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [", ".join(f"{name} {value}" for name, value in found["machine"].items()), ""]
    for part, tests in found["tests"].items():
        counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines += [
            f"tests ({part}): {counts} {tests.get('error', '')}".rstrip(),
            *(f"  {test}" for test in tests["failures"]),
        ]
    widths = [max(len(title), 9) for title in COLUMNS.values()]
    titles = "  ".join(title.rjust(width) for title, width in zip(COLUMNS.values(), widths))
    lines += ["", f"{'case':30s} {'device':6s} {'form':9s}{titles}"]
    for row in found["rows"]:
        head = f"{row['case']:30s} {row['device']:6s} {row['form']:9s}"
        values = [_figure(row.get(key)).rjust(width) for key, width in zip(COLUMNS, widths)]
        lines.append(head + (row["error"] if "error" in row else "  ".join(values)))
    for name, seconds in found["compilation_beside_tests_s"].items():
        lines.append(f"compilation of {name}, beside the tests: {_figure(seconds)} s")
    return "\n".join([*lines, f"took {found['took_s']:.0f} s"])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for what is found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="everything small, one case compiled: a minute or two")
    # For the processes that this one starts.
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        for name, forms in args.run.items():
            run_forms(name, forms, args.device, args.short, args.warm)
        return
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error(
                "--device cuda: torch sees no GPU here. --device cpu --short runs it all in small without one."
            )
    args.out.mkdir(parents=True, exist_ok=True)
    check = Check(args.out.resolve(), args.device, args.short)
    good = check()
    print(text := table(check.found))
    (args.out / "gpu_check.txt").write_text(text + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
