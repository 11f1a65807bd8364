"""The packaged recipes, and what each one's first comment says it reached."""

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

import lit_rl

MEASURED = re.compile(
    r"Greedy (?P<what>return|games (?:not lost|won), in %,) over (?P<episodes>\d+) episodes, "
    r"(?P<seeds>seeds? [\d to]+): .*?; "
    r"median (?P<median>-?[\d.]+)\."
)
NOT_MEASURED = "# Not measured over seeds yet."
LENGTHS = {"env steps": re.compile(r"([\d,]+) env steps"), "updates": re.compile(r"([\d,]+) updates")}


@dataclass(frozen=True)
class Recipe:
    """A recipe and its result.

    Attributes:
        name: what `--config` takes.
        algorithm, env: the class and the environment, without their modules.
        env_steps: of one run: those it took where it was measured, its budget where not; or `updates`.
        updates: of one run that learns from recorded data, and takes no env steps.
        episodes, seeds: of the measurement; 0 and "" where there is none.
        median: over the seeds, of the mean return of the greedy episodes; None where it is not measured.
        is_share: whether it is that of the percentage of games that are won, or not lost, against random actions.
    """

    name: str
    algorithm: str
    env: str
    env_steps: int
    episodes: int
    seeds: str
    median: float | None
    is_share: bool = False
    updates: int = 0


def recipe_files() -> dict[str, Path]:
    """The YAML file of each packaged recipe, by name."""
    folder = Path(str(importlib.resources.files(lit_rl) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(path: Path) -> Recipe:
    """What a recipe's options and its first comment say."""
    text = path.read_text()
    config = yaml.safe_load(text)
    data = config["data"]["init_args"]
    head = text.split("\nseed_everything")[0]
    is_offline = "max_updates" in data  # its comment may speak of the env steps of the data, too
    measured, steps = MEASURED.search(head), LENGTHS["updates" if is_offline else "env steps"].search(head)
    budget = data["max_updates" if is_offline else "max_env_steps"]
    length = int(steps[1].replace(",", "")) if measured and steps else budget
    return Recipe(
        name=path.stem,
        algorithm=config["model"]["class_path"].rpartition(".")[2],
        env=_short(data.get("env") or data["evaluation"]["env"]),
        env_steps=0 if is_offline else length,
        updates=length if is_offline else 0,
        episodes=int(measured["episodes"]) if measured else 0,
        seeds=measured["seeds"] if measured else "",
        median=float(measured["median"]) if measured else None,
        is_share=measured is not None and measured["what"] != "return",
    )


def _short(env: str) -> str:
    """An environment's name without the packages it lies in; a class by its name alone."""
    name = env.rpartition(":")[2]
    return name if name[:1].isupper() else env.rpartition(".")[2]


def table() -> str:
    """All recipes with their results, one a line."""
    rows = [("recipe", "algorithm", "environment", "env steps", "median return", "seeds, episodes")]
    for path in recipe_files().values():
        recipe = read_recipe(path)
        measured = recipe.median is not None
        rows.append(
            (
                recipe.name,
                recipe.algorithm,
                recipe.env,
                f"{recipe.updates:,} updates" if recipe.updates else f"{recipe.env_steps:,}",
                f"{recipe.median:.1f}{' %' if recipe.is_share else ''}" if measured else "not measured",
                f"{recipe.seeds.split(maxsplit=1)[1]}, {recipe.episodes}" if measured else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    numbers = ("env steps", "median return")
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(rows[0], row, widths)
        ).rstrip()
        for row in rows
    )
