"""Which command works with which family of models: `docs/models.md`, from tiny random models of every family in turn.

    python benchmarks/families.py --out docs/models.md

Each command runs on each family (tests/architectures.py) and what it wrote is compared with plain transformers (tests/
family_trials.py). The page is the same on every machine with the same transformers. --quick: a few families, no page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from architectures import FAMILIES
from family_trials import TRIALS, Cell, prepare, trial

QUICK = ("Llama", "Gemma 2", "Qwen3.5", "StableLM")
INTRODUCTION = """# Models

A model is asked before it is trusted: at load time two random sequences go through a small random model of its config,
packed in one row, padded, and each alone, in float32, long enough to cross every window, chunk and rope threshold. What
each alone gives with transformers' eager attention is the truth. The fastest layout that agrees is taken, and a slower
one is said on the console; a model whose logits, causality or results cannot be told is refused. Answers are kept under
`~/.cache/limbeck/probes` (`XDG_CACHE_HOME`), by config, device, versions and the code that was asked.

The table is made by `python benchmarks/families.py --out docs/models.md`, with transformers {version}: every command
ran on a tiny random model of every family, and what it wrote was compared with plain transformers, one sequence at a
time. Losses and divergences agree to 1e-5 of their size, greedy texts are the same, exports load.

- **yes**: works.
- **padded**, **alone**: works; sequences are padded in groups of like length, or run one at a time, instead of packed.
- **plain**: works; transformers' own forward writes, instead of the lean decoder.
- **no**: refused in one line, with the reason below.

Of models that also see or hear, the text part is taken; where transformers has a text model for it, what is written is
that model alone.
"""
SHORT = {"one at a time": "alone", "plain forward": "plain"}
GENERAL = (
    (r"\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)", "the model"),
    (r"model type '\w+'", "its model type"),
    (r"did you mean '\w+'\?", "known are gemma, llama, mistral, qwen2, qwen3"),
    (r"^\w+(?=: experts and dense)", "the family"),
    (r"layers\.\d+\.", "layers.N."),
    (r"^[\w.]+(?=: no rule)", "a tensor of its layers"),
)
"""What differs between families in one and the same refusal."""


def main() -> None:
    """Run the trials and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to write")
    parser.add_argument("--quick", action="store_true", help="a few families, no page")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    names = QUICK if options.quick else tuple(FAMILIES)
    found = {name: trials_of(name) for name in names}
    wrong = [
        f"{name}, {command}: {cell.reason}"
        for name, row in found.items()
        for command, cell in row.items()
        if cell.state == "WRONG"
    ]
    if options.out is not None and not options.quick:
        options.out.write_text(page(found), encoding="utf-8")
    states = [cell.state for row in found.values() for cell in row.values()]
    print(
        json.dumps(
            {"families": len(found), "wrong": wrong} | {s: states.count(s) for s in ("works", "slower", "refused")}
        )
    )
    sys.exit(1 if wrong else 0)


def trials_of(name: str) -> dict[str, Cell]:
    """All commands on one family."""
    with tempfile.TemporaryDirectory() as directory:
        place, row = prepare(name, Path(directory) / "family"), {}
        for command in TRIALS:
            row[command] = trial(name, command, place)
            print(f"{name:18} {command:14} {row[command].state:8} {row[command].reason}", file=sys.stderr, flush=True)
    return row


def page(found: dict[str, dict[str, Cell]]) -> str:
    """The whole page; equal reasons have one number."""
    reasons: dict[str, int] = {}
    lines = [f"| family | | {' | '.join(TRIALS)} |", "|---|---|" + "---|" * len(TRIALS)]
    for name, row in found.items():
        cells = [_shown(row[command], reasons) for command in TRIALS]
        lines.append(f"| {name} | {FAMILIES[name].kind} | {' | '.join(cells)} |")
    listed = [f"{number}. {_escaped(reason)}" for reason, number in reasons.items()]
    return "\n".join([INTRODUCTION.format(version=transformers.__version__), *lines, "", "## Why not", "", *listed, ""])


def _shown(cell: Cell, reasons: dict[str, int]) -> str:
    if cell.state == "works":
        return "yes"
    if cell.state == "slower":
        return SHORT.get(cell.reason, cell.reason)
    reason = cell.reason
    for pattern, general in GENERAL:
        reason = re.sub(pattern, general, reason)
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"{'no' if cell.state == 'refused' else '**wrong**'} ({number})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


if __name__ == "__main__":
    main()
