"""Pages that are made from the code are current."""

from __future__ import annotations

from support.recipe_page import page
from support.running import ROOT


def test_the_page_of_the_recipe_is_current():
    made = "PYTHONPATH=. python tests/support/recipe_page.py > docs/recipe.md"
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page(), made


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
