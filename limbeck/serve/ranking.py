"""How a query and documents become the prefix and the items that a model scores."""

from __future__ import annotations

from typing import NamedTuple

from limbeck.ranking.featurize import FeaturizeConfig, one_line


class RankPrompt(NamedTuple):
    """Two templates: what is shared, and what a document adds."""

    prefix: str
    """Holds {query}."""
    item: str
    """Holds {document}."""
    has_lines: bool = True
    """Whether texts keep their line breaks; those of a trained model have none, as in its training."""

    def prefix_of(self, query: str) -> str:
        """The shared part; braces in a query mean nothing."""
        return self.prefix.replace("{query}", self._text(query))

    def item_of(self, document: str) -> str:
        """What a document adds; a label follows."""
        return self.item.replace("{document}", self._text(document))

    def _text(self, text: str) -> str:
        return text if self.has_lines else one_line(text)


GENERAL = RankPrompt(
    "Is the document relevant to the query?\nQuery: {query}\n", "Document: {document}\nRelevant (yes or no):"
)
"""For models that were not trained to rank."""


def trained(features: FeaturizeConfig) -> RankPrompt:
    """As a ranking model was trained: a document is an item, and the query is the query, or else the member.

    There is no history, and no context.
    """
    has_query = "{query}" in features.prefix
    prefix = features.prefix.format(
        instruction=features.instruction.replace("{", "{{").replace("}", "}}"),
        query="{query}",
        context=features.empty,
        member=features.empty if has_query else "{query}",
        history=f" {features.empty}",
    )
    return RankPrompt(prefix, features.candidate.format(item="{document}"), has_lines=False)
