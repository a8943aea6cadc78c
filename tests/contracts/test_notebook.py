"""The notebook of the documentation: valid, with its outputs, and it runs from top to bottom in one process."""

import ast
import time

import nbformat
import pytest
from docs_blocks import ROOT

NOTEBOOK = nbformat.read(ROOT / "docs" / "tutorials" / "quickstart.ipynb", as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
MOST_SECONDS = 120


def run_cell(source, names):
    """Run a cell as a notebook does; what its last line is worth, as text, or None."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else repr(eval(compile(ast.Expression(last.value), "cell", "eval"), names))


def stored_result(cell):
    return next((o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result"), None)


def test_it_is_valid_and_shows_its_outputs():
    nbformat.validate(NOTEBOOK)
    assert [cell.execution_count for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell.outputs]
    assert len(outputs) >= len(CELLS)
    assert {output.output_type for output in outputs} == {"stream", "display_data", "execute_result"}, "and no error"
    assert any("text/html" in output.get("data", {}) for output in outputs)


def test_it_runs_in_two_minutes_and_gives_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, start = {}, time.process_time()
    for cell in CELLS:
        found, stored = run_cell(cell.source, names), stored_result(cell)
        assert (found is None) == (stored is None)
        if stored is not None and "." not in stored and "\n" not in stored:  # fractions are a machine's own
            assert found == stored
    assert time.process_time() - start < MOST_SECONDS


@pytest.mark.parametrize("cell", CELLS, ids=range(1, len(CELLS) + 1))
def test_its_lines_fit_the_page(cell):
    assert max(map(len, cell.source.splitlines())) <= 125
