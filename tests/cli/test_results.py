"""What the README and the recipes say of results is what `docs/results` holds."""

import json
from pathlib import Path

import pytest
from helpers import ROOT

RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
RESULTS = sorted(path for path in (ROOT / "docs" / "results").glob("*.json") if path.stem in RECIPES)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_recipes_first_comment_gives_its_measured_returns(path: Path) -> None:
    result = json.loads(path.read_text())
    returns = ", ".join(f"{run['return_mean']:g}" for run in result["runs"])
    head = (ROOT / "recipes" / f"{path.stem}.yaml").read_text().split("seed_everything")[0]
    seeds = [run["seed"] for run in result["runs"]]
    named = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    assert f"{named}: {returns}; median {result['median']:g}." in head
    assert f"{result['runs'][0]['env_steps']:,} env steps" in head
    assert path.with_suffix(".png").exists()


def test_the_readme_has_no_place_left_to_fill() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "@" not in readme
    for path in RESULTS:
        median = json.loads(path.read_text())["median"]
        assert f"{median:.1f}".removesuffix(".0") in readme
