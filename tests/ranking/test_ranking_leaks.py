"""What a table gives away: features that tell the label, features that change, and what training saw of the test."""

import numpy as np

from limbeck.ranking.interaction import Interaction, LogRow
from limbeck.ranking.leaks import leaks, tells_label
from limbeck.ranking.request import GroupingConfig, group_log
from limbeck.ranking.split import SplitConfig, split_requests


def split_of(count=60, **features):
    rng = np.random.default_rng(3)
    rows = []
    for n in range(count):
        label = bool(rng.random() < 0.4)
        item = {name: value(n, label) for name, value in features.items()}
        rows.append(LogRow(f"m{n % 4}", Interaction(item_id=f"i{n % 9}", item=item, label=label, time=float(n))))
    requests, _ = group_log(rows, {}, GroupingConfig(candidates=3, min_history=0))
    return split_requests(requests, SplitConfig())


def test_a_feature_that_tells_the_label_is_told():
    notes, _ = leaks(
        split_of(receipt=lambda n, label: f"r{n % 3}" if label else "none", colour=lambda n, _: f"c{n % 3}")
    )
    (note,) = [note for note in notes if "tells the label" in note]
    assert "item feature 'receipt'" in note and "colour" not in "".join(notes)


def test_what_training_saw_of_the_test_part_is_counted():
    notes, counts = leaks(split_of(colour=lambda n, _: "red"))
    assert counts["test_items"] == counts["test_items_seen_in_training"] == 9
    assert counts["test_pairs_seen_in_training"] > 0 and "test_queries_seen_in_training" not in counts
    assert any("9 test items seen in training" in note for note in notes)


def test_values_that_are_all_different_tell_nothing():
    labels = np.arange(40) % 2 == 0
    assert not tells_label(np.arange(40), labels)
    assert tells_label(np.arange(40) % 2, labels)
    assert not tells_label(np.arange(40) % 2, np.ones(40, dtype=bool))
