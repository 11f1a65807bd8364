"""`lit-rl recipes`: every recipe, with what its first comment says it reached."""

from pathlib import Path

import pytest

from lit_rl.cli import main, recipe_index
from lit_rl.cli.recipe_index import LENGTHS, MEASURED, NOT_MEASURED, read_recipe, recipe_files
from lit_rl.cli.shared import OWN

RECIPES = recipe_files()


@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_a_recipes_first_comment_says_what_it_reached_or_that_it_is_not_measured(path: Path) -> None:
    head = path.read_text().split("\nseed_everything")[0]
    assert bool(MEASURED.search(head)) != (NOT_MEASURED in head)
    assert NOT_MEASURED in head or any(length.search(head) for length in LENGTHS.values())


def test_results_are_read_from_the_first_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dqn_maze.yaml"
    path.write_text(
        "# lit-rl fit --config recipes/dqn_maze.yaml\n"
        "# Greedy return over 20 episodes, seeds 1 to 3: -1.5, 2, -3; median -1.5.\n"
        "# 1,234 env steps, 1 s.\n"
        "seed_everything: 1\n"
        "model: {class_path: lit_rl.DQN}\n"
        "data: {init_args: {env: Maze-v0, max_env_steps: 2_000}}\n"
    )
    recipe = read_recipe(path)
    assert (recipe.name, recipe.algorithm, recipe.env) == ("dqn_maze", "DQN", "Maze-v0")
    assert (recipe.env_steps, recipe.median, recipe.episodes, recipe.seeds) == (1234, -1.5, 20, "seeds 1 to 3")
    path.write_text(path.read_text().replace("# Greedy", "# Not measured over seeds yet.\n# Random"))
    unmeasured = read_recipe(path)
    assert (unmeasured.median, unmeasured.env_steps) == (None, 2000)
    monkeypatch.setattr(recipe_index, "recipe_files", lambda: {path.stem: path})
    assert recipe_index.table().splitlines()[1].split(maxsplit=4) == [
        "dqn_maze",
        "DQN",
        "Maze-v0",
        "2,000",
        "not measured",
    ]


@pytest.mark.parametrize("counts", ["not lost", "won"])
def test_a_recipe_of_a_game_is_measured_in_games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: str) -> None:
    path = tmp_path / "ppo_chess.yaml"
    path.write_text(
        f"# Greedy games {counts}, in %, over 500 episodes, seeds 1 to 3: 99, 98.5, 100; median 99.\n"
        "# 1,234 env steps, 1 s.\n"
        "seed_everything: 1\n"
        "model: {class_path: PPO}\n"
        "data: {init_args: {env: chess, max_env_steps: 2_000}}\n"
    )
    recipe = read_recipe(path)
    assert (recipe.median, recipe.is_share, recipe.episodes) == (99.0, True, 500)
    monkeypatch.setattr(recipe_index, "recipe_files", lambda: {path.stem: path})
    assert recipe_index.table().splitlines()[1].endswith("1,234         99.0 %  1 to 3, 500")


def test_the_command_lists_every_recipe_once(capsys: pytest.CaptureFixture) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(RECIPES) + 1]] == sorted(RECIPES)
    (cartpole,) = [line.split() for line in lines if line.startswith("ppo_cartpole ")]
    assert cartpole[1:5] == ["PPO", "CartPole-v1", "99,328", "500.0"]
    (iql,) = [line.split() for line in lines if line.startswith("iql_pendulum ")]
    assert iql[3:5] == ["6,000", "updates"]  # not the env steps of its data
    assert max(map(len, lines)) <= 118


def test_the_commands_are_told_of_in_the_help(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    for command in OWN:
        assert f"\n  {command} " in said
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"lit-rl {command}" in capsys.readouterr().out
