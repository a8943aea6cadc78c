"""A recipe from traces to a served model: its stages in order, each skipped when nothing that it depends on changed."""
