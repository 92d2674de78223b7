"""Pages that are made from the code are current."""

from __future__ import annotations

import re

from support.recipe_page import page
from support.running import ROOT, call


def test_the_page_of_the_recipe_is_current():
    made = "PYTHONPATH=. python tests/support/recipe_page.py > docs/recipe.md"
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page(), made


def test_the_hours_are_those_that_plan_says():
    text = (ROOT / "docs" / "how_long.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    parts = [part.split("\n", 1) for block in blocks for part in block.split("$ python -m pipeline.plan ")[1:]]
    assert len(parts) == 3
    for words, shown in parts:
        done = call("plan", *words.split())
        assert done.stdout == shown, f"{words}\n{done.stdout}\n{done.stderr}"


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
