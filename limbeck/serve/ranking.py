"""How a query and documents become the prefix and the items that a model scores."""

from __future__ import annotations

from typing import NamedTuple

from limbeck.ranking.featurize import FeaturizeConfig


class RankPrompt(NamedTuple):
    """Two templates: what is shared, and what a document adds."""

    prefix: str
    """Holds {query}."""
    item: str
    """Holds {document}."""

    def prefix_of(self, query: str) -> str:
        """The shared part; braces in a query mean nothing."""
        return self.prefix.replace("{query}", query)

    def item_of(self, document: str) -> str:
        """What a document adds; a label follows."""
        return self.item.replace("{document}", document)


GENERAL = RankPrompt(
    "Is the document relevant to the query?\nQuery: {query}\n", "Document: {document}\nRelevant (yes or no):"
)
"""For models that were not trained to rank."""


def trained(features: FeaturizeConfig) -> RankPrompt:
    """As a ranking model was trained: the query is the member, without a history, and a document is an item."""
    prefix = features.prefix.format(
        instruction=features.instruction.replace("{", "{{").replace("}", "}}"),
        member="{query}",
        history=f" {features.empty}",
    )
    return RankPrompt(prefix, features.candidate.format(item="{document}"))
