"""Stages in order, each skipped when nothing changed; `limbeck.pipeline(...)` runs a recipe.

Example:
    from limbeck.pipeline import SmokeConfig

    SmokeConfig(model="tiny-student")
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CardConfig": "config",
        "ChooseConfig": "choose",
        "HubConfig": "config",
        "PipelineConfig": "config",
        "RankPipelineConfig": "ranking",
        "SmokeConfig": "smoke",
    },
)
make_callable(__name__)
