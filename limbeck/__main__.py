"""`python -m limbeck` and the `limbeck` command.

A finished pipeline is told from sizes and times of its files, before the libraries of the stages are imported.
"""

import importlib
import sys

from limbeck.pipeline import finished


def main() -> None:
    """Answer at once where a pipeline has nothing to do; else hand over to the command line."""
    if sys.argv[1:2] == ["pipeline"] and finished.answer(sys.argv[2:]):
        return
    importlib.import_module("limbeck.cli").main()


if __name__ == "__main__":
    main()
