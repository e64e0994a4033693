"""Named data sets: `recipe: NAME` in a config, `tagllm prepare NAME` on the command line."""

from __future__ import annotations

from tagllm.data.recipes import files, hub, packaged
from tagllm.data.recipes.recipe import Recipe, RecipeRow, pair_key
from tagllm.errors import UserError, did_you_mean

__all__ = ["RECIPES", "Recipe", "RecipeRow", "pair_key", "recipe_of"]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*packaged.RECIPES, *files.RECIPES, *hub.RECIPES)}


def recipe_of(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"recipe: {name!r} is no named data set. {did_you_mean(name, RECIPES)}")
    return RECIPES[name]
