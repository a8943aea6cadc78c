"""The three sentences on a cut, from made-up rows of two regimes."""

from __future__ import annotations

import pytest

from limbeck.report.cuts import control_of, cut_sentences, recommended


def make_row(regime, policy, fraction, gain, flops=1.0, control_of=(), half_width=0.05):
    return {
        "name": f"{regime} {policy} {fraction}" + " fewer" * bool(control_of),
        "regime": regime,
        "policy": policy,
        "lead_fraction": fraction,
        "control": bool(control_of),
        "control_of": list(control_of),
        "gain_kept": gain,
        "gain_kept_low": None if gain is None else gain - half_width,
        "gain_kept_high": None if gain is None else gain + half_width,
        "base_accuracy": 0.5,
        "accuracy": 0.9,
        "flops": 1e12 * flops,
        "train_seconds": 20 * flops,
        "peak_bytes": 1e8 * (0.5 + flops / 2),
    }


def make_rows(novice=0.4, fewer_novice=0.7):
    return [
        make_row("capable", "lead", 1.0, 1.0),
        make_row("capable", "common_length", 0.25, 0.6, 0.2),
        make_row("capable", "common_length", 0.5, 0.98, 0.4),
        make_row("capable", "common_length", 0.75, 1.01, 0.7),
        make_row("capable", "lead", 0.5, 0.3, 0.41),
        make_row("capable", "lead", 1.0, 0.6, 0.4, ["capable common_length 0.5", "capable lead 0.5"]),
        make_row("novice", "lead", 1.0, 1.0),
        make_row("novice", "common_length", 0.5, novice, 0.4),
        make_row("novice", "lead", 1.0, fewer_novice, 0.4, ["novice common_length 0.5"]),
    ]


def test_the_recommended_run_is_the_cheapest_that_keeps_enough():
    rows = make_rows()
    assert recommended(rows)["name"] == "capable common_length 0.5"
    assert (
        recommended([row for row in rows if row["gain_kept"] < 0.9 or row["lead_fraction"] == 1])["lead_fraction"] == 1
    )
    assert recommended(rows, "novice")["name"] == "novice lead 1.0"
    assert control_of(rows, rows[4])["name"].endswith("fewer")


def test_three_sentences_say_what_is_saved_kept_and_when():
    rows = make_rows()
    saves, keeps, when = (sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in cut_sentences(rows, rows[2]))
    assert saves == (
        "What a cut saves: one length for all traces that keeps 50 % of all tokens took 40 % of the FLOPs, 40 % of the "
        "training seconds and 70 % of the peak memory of whole traces."
    )
    assert "98 % (93–103) of what whole traces bring a student" in keeps and "from a score of 0.50 to 0.90" in keeps
    assert "(fewer whole traces at that cost 60 % (55–65), the same share of each trace 30 % (25–35))" in keeps
    assert keeps.endswith(
        "the cheapest run that keeps 95 % of it is one length for all traces that keeps 50 % of all tokens."
    )
    assert "the same cut kept 40 % (35–45) of the gain of a novice" in when
    assert when.endswith("so whole traces come first there.")


@pytest.mark.parametrize(
    ("novice", "fewer", "end"),
    [
        (0.9, 0.5, "so it pays there too."),
        (0.6, 0.62, "which these problems cannot tell apart."),
        (None, 0.5, "50 % (45–55))."),
    ],
)
def test_what_is_said_of_the_novice_follows_from_its_intervals(novice, fewer, end):
    rows = make_rows(novice, fewer)
    assert cut_sentences(rows, rows[2])[2].replace("\N{NO-BREAK SPACE}", " ").endswith(end)
