"""How fast a run is said to be."""

from types import SimpleNamespace
from typing import Any

import pytest

from lit_rl.learner import reporting
from lit_rl.learner.reporting import Reporter


def test_env_steps_per_second_count_the_repeats_between_but_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
    trainer: Any = SimpleNamespace(
        callback_metrics={}, progress_bar_metrics={}, loggers=[], fit_loop=SimpleNamespace(total_batch_idx=0)
    )
    reporter, found = Reporter(trainer), []
    for ended, new, pause in ((1.0, 100, 0.0), (2.0, 0, 0.0), (3.0, 0, 50.0), (55.0, 100, 0.0), (57.0, 0, 0.0)):
        now[0] = ended
        reporter.update({}, started=ended, waited_s=0.0, step=0, new=new)
        found.append(float(trainer.callback_metrics["time/env_steps_per_s"]))
        now[0] += pause
        reporter.resume_timing()
    assert found == [100.0, 100.0, 100.0, 25.0, 25.0]  # 2 s of repeats, 50 s of evaluation, 2 s of the update
