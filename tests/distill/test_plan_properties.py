"""What the plan of steps promises for all lengths, budgets and numbers of ranks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.plan import plan_steps

PLANS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=40),
        "batch": st.one_of(st.tuples(st.integers(1, 9), st.none()), st.tuples(st.none(), st.integers(1, 200))),
        "microbatch_tokens": st.integers(1, 150),
        "layout": st.sampled_from(["packed", "padded"]),
        "bucket_batches": st.integers(1, 5),
        "seed": st.integers(0, 2**32 - 1),
        "epochs": st.floats(0.1, 3.0),
    }
)


def make(plan, **changes):
    settings_ = {key: value for key, value in plan.items() if key not in ("lengths", "batch")}
    size, tokens = plan["batch"]
    return plan_steps(plan["lengths"], batch_size=size, batch_tokens=tokens, **{**settings_, **changes})


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_every_example_once_an_epoch_and_budgets_hold(plan):
    lengths, (size, tokens) = plan["lengths"], plan["batch"]
    steps = make(plan, epochs=1.0)
    assert sorted(index for step in steps for index in step.indices) == list(range(len(lengths)))
    for step in steps:
        assert step.indices
        if size is not None:
            assert len(step.indices) <= size
        else:
            assert len(step.indices) == 1 or sum(lengths[i] for i in step.indices) <= tokens
        for group in (group for rank in step.microbatches for group in rank):
            members = [lengths[i] for i in group]
            cost = sum(members) if plan["layout"] == "packed" else len(members) * max(members)
            assert len(group) == 1 or cost <= plan["microbatch_tokens"]


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(2, 5))
def test_ranks_only_deal_out_the_same_steps(plan, world_size):
    alone, together = make(plan), make(plan, world_size=world_size)
    assert alone == make(plan)
    assert [sorted(step.indices) for step in alone] == [sorted(step.indices) for step in together]
    assert all(len(step.microbatches) == world_size for step in together)
    for step in together:
        counts = [sum(map(len, rank)) for rank in step.microbatches]
        assert sum(count > 0 for count in counts) == min(world_size, len(step.indices))


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_epochs_are_counted_in_sequences(plan):
    num_sequences = sum(len(step.indices) for step in make(plan))
    assert num_sequences == max(1, round(plan["epochs"] * len(plan["lengths"])))


@settings(max_examples=40, deadline=None)
@given(PLANS, st.integers(1, 30), st.integers(1, 500))
def test_limits_stop_at_the_first_step_that_reaches_them(plan, max_steps, max_tokens):
    lengths = plan["lengths"]
    assert len(make(plan, max_steps=max_steps)) == max_steps
    tokens = [sum(lengths[i] for i in step.indices) for step in make(plan, max_tokens=max_tokens)]
    assert sum(tokens[:-1]) < max_tokens <= sum(tokens)
