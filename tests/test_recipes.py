"""The recipes in examples/ are pipelines that exist, and each says how it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgec.pipeline import Pipeline

pytestmark = pytest.mark.pure

RECIPES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


def test_there_are_three() -> None:
    assert [r.stem for r in RECIPES] == ["board_classifier", "keyword_spotter", "phone_transformer"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_reads_and_names_its_command(recipe: Path) -> None:
    pipeline = Pipeline.of(recipe)
    assert len(pipeline) >= 2
    assert Pipeline.parse(pipeline.spelling()) == pipeline
    assert f"--passes examples/{recipe.name}" in recipe.read_text()
