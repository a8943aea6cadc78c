"""The fused head and loss equals its plain twin, value and gradients, however it is cut and fed."""

import dataclasses
import itertools

import pytest
import torch
from dense_twin import twin_loss

from limbeck.distill.divergence import DIVERGENCES, DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.errors import ConfigError, ShapeError
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.topk import TopKTargets

N, D, V = 9, 5, 13
FORWARD_KL = DivergenceConfig(name="forward_kl")
SETTINGS = {"jsd": {"beta": 0.3}, "combined_kl": {"forward_ratio": 0.7}}
EVERY = [DivergenceConfig(name=name, **SETTINGS.get(name, {})) for name in sorted(DIVERGENCES)]
every_divergence = pytest.mark.parametrize("divergence", EVERY, ids=lambda config: config.name)
every_teacher = pytest.mark.parametrize("teacher", ["dense", "topk", "topk_all", "ragged"])


def topk(logits: torch.Tensor, k: int) -> TopKTargets:
    log_probs, order = logits.log_softmax(-1).sort(-1, descending=True)
    return TopKTargets(order[:, :k].clone(), log_probs[:, :k].clone(), log_probs[:, k:].logsumexp(-1))


def ragged(logits: torch.Tensor) -> TopKTargets:
    """Rows of 1 to 4 entries, the last of all; padding has ids of its own, of another entry or of none."""
    whole = topk(logits, logits.shape[1])
    counts = torch.arange(len(logits)) % 4 + 1
    counts[-1] = logits.shape[1]
    padding = torch.arange(logits.shape[1]) >= counts[:, None]
    tails = whole.log_probs.masked_fill(~padding, -torch.inf).logsumexp(-1)
    filler = torch.tensor([-1, 0, 5])[torch.arange(len(logits)) % 3, None]
    return TopKTargets(torch.where(padding, filler, whole.ids), whole.log_probs.masked_fill(padding, -torch.inf), tails)


def make_targets(teacher: str, vocab: int = V, teacher_vocab: int | None = None) -> DenseTargets | TopKTargets:
    dense = DenseTargets(
        torch.randn(N, 7, dtype=torch.float64),
        torch.randn(teacher_vocab or vocab, 7, dtype=torch.float64),
        torch.randn(teacher_vocab or vocab, dtype=torch.float64),
    )
    if teacher == "dense":
        return dense
    logits = 2.0 * torch.randn(N, vocab, dtype=torch.float64)
    return ragged(logits) if teacher == "ragged" else topk(logits, 4 if teacher == "topk" else vocab)


def make_problem(teacher: str = "dense", *, bias: bool = False, labels_below: int = V, **options) -> dict:
    """Arguments of both losses: some rows have only CE, some only KD, some neither."""
    torch.manual_seed(7)
    ce_coef, kd_coef = torch.rand(2, N, dtype=torch.float64)
    ce_coef[[0, 3]], kd_coef[[1, 3]] = 0.0, 0.0
    labels = torch.randint(0, labels_below, (N,))
    labels[[0, 3]] = -100
    return {
        "hidden": torch.randn(N, D, dtype=torch.float64, requires_grad=True),
        "head_weight": torch.randn(V, D, dtype=torch.float64, requires_grad=True),
        "head_bias": torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None,
        "labels": labels,
        "ce_coef": ce_coef,
        "kd_coef": kd_coef,
        "targets": make_targets(teacher, labels_below),
        "divergence": FORWARD_KL,
    } | options


def cast(problem: dict, dtype: torch.dtype) -> dict:
    def convert(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, DenseTargets | TopKTargets):
            fields = {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**fields)
        return value

    return {name: convert(value) for name, value in problem.items()}


def leaves(problem: dict) -> list[torch.Tensor]:
    return [problem[name] for name in ("hidden", "head_weight", "head_bias") if problem[name] is not None]


def assert_equals_twin(problem: dict, tolerance: float = 1e-10, **cut) -> None:
    fused, twin = fused_loss(**problem, **cut).total, twin_loss(**problem)
    torch.testing.assert_close(fused, twin.detach(), rtol=tolerance, atol=tolerance)
    inputs = [x for x in leaves(problem) if x.requires_grad]
    # What arrives from above is 1 in a plain backward(), and anything when the loss is one term of another.
    for from_above in (1.0, -2.5):
        gradients = torch.autograd.grad(from_above * fused, inputs, retain_graph=True)
        expected = torch.autograd.grad(from_above * twin, inputs, retain_graph=True)
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


@every_divergence
@every_teacher
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_twin(divergence, teacher, temperature, bias):
    problem = make_problem(teacher, bias=bias, divergence=divergence, temperature=temperature)
    assert_equals_twin(problem, chunk_bytes=600)


@every_divergence
@every_teacher
def test_equals_the_twin_in_float32(divergence, teacher):
    problem = make_problem(teacher, bias=True, divergence=divergence, temperature=1.5)
    assert_equals_twin(cast(problem, torch.float32), tolerance=1e-5, chunk_bytes=400)


@every_teacher
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 3, 7, 1000])
def test_chunk_size_does_not_matter(teacher, rows_a_chunk):
    assert_equals_twin(make_problem(teacher), chunk_bytes=rows_a_chunk * V * 8)


@every_teacher
def test_block_size_does_not_matter(teacher, monkeypatch):
    monkeypatch.setattr("limbeck.distill.fused.CPU_BLOCK_BYTES", 2 * V * 8)
    assert_equals_twin(make_problem(teacher, bias=True))


@every_teacher
@pytest.mark.parametrize("frozen", [("head_weight",), ("hidden",), ("head_bias",), ("hidden", "head_bias")])
def test_frozen_inputs_get_no_gradient_and_change_no_other(teacher, frozen):
    problem = make_problem(teacher, bias=True)
    for name in frozen:
        problem[name] = problem[name].detach()
    assert_equals_twin(problem)
    fused_loss(**problem).total.backward()
    assert all(problem[name].grad is None for name in frozen)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_vocab", [V - 3, V + 4])
def test_vocabularies_padded_to_different_sizes(divergence, temperature, teacher_vocab):
    targets = make_targets("dense", teacher_vocab=teacher_vocab)
    problem = make_problem(divergence=divergence, temperature=temperature, targets=targets)
    assert_equals_twin(problem)


@every_teacher
@pytest.mark.parametrize("teacher_vocab", [V - 5, V + 4])
def test_padding_of_the_head_takes_no_part(teacher, teacher_vocab):
    targets = make_targets(teacher, V - 2, teacher_vocab)
    problem = make_problem(bias=True, labels_below=V - 2, targets=targets, vocab_size=V - 2)
    assert_equals_twin(problem)
    value = fused_loss(**problem).total
    with torch.no_grad():
        problem["head_weight"][V - 2 :] = torch.nan
        problem["head_bias"][V - 2 :] = torch.nan
    result = fused_loss(**problem)
    result.total.backward()
    assert result.total == value
    assert (problem["head_weight"].grad[V - 2 :] == 0).all() and (problem["head_bias"].grad[V - 2 :] == 0).all()


def test_rows_without_coefficients_are_not_read():
    problem = make_problem()
    expected = fused_loss(**problem)
    unread = problem | {"hidden": problem["hidden"].detach().clone()}
    unread["hidden"][3] = torch.nan
    assert fused_loss(**unread).total == expected.total
    assert expected.head_rows == N - 1


@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_targets_are_not_read_where_kd_coef_is_zero(teacher):
    problem = make_problem(teacher)
    expected = torch.autograd.grad(fused_loss(**problem).total, leaves(problem))
    targets = problem["targets"]
    if isinstance(targets, DenseTargets):
        targets.hidden[[1, 3]] = torch.nan
    else:
        targets.ids[[1, 3]] = 10**9
        targets.log_probs[[1, 3]] = torch.nan
        targets.log_tail[[1, 3]] = torch.nan
    for gradient, wanted in zip(
        torch.autograd.grad(fused_loss(**problem).total, leaves(problem)), expected, strict=True
    ):
        assert torch.equal(gradient, wanted)


@every_teacher
def test_parts_of_a_batch_add_up(teacher):
    problem = make_problem(teacher, bias=True)
    fused_loss(**problem).total.backward()
    whole = [x.grad.clone() for x in leaves(problem)]
    for x in leaves(problem):
        x.grad = None
    total = 0.0
    for rows in (slice(0, 4), slice(4, N)):
        targets = problem["targets"]
        if isinstance(targets, DenseTargets):
            part = DenseTargets(targets.hidden[rows], targets.head_weight, targets.head_bias)
        else:
            part = TopKTargets(targets.ids[rows], targets.log_probs[rows], targets.log_tail[rows])
        cut = {name: problem[name][rows] for name in ("hidden", "labels", "ce_coef", "kd_coef")}
        loss = fused_loss(**(problem | cut | {"targets": part})).total
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(fused_loss(**problem).total.item(), abs=1e-12)
    for x, expected in zip(leaves(problem), whole, strict=True):
        torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@every_teacher
def test_gradcheck(teacher):
    problem = make_problem(teacher, bias=True, divergence=EVERY[2], temperature=1.3)
    inputs = leaves(problem)

    def total(hidden, head_weight, head_bias):
        named = {"hidden": hidden, "head_weight": head_weight, "head_bias": head_bias}
        return fused_loss(**(problem | named), chunk_bytes=4 * V * 8).total

    assert torch.autograd.gradcheck(total, inputs)


@every_divergence
def test_topk_of_the_whole_vocabulary_is_the_dense_loss(divergence):
    problem = make_problem("dense", bias=True, divergence=divergence, temperature=2.0)
    dense = problem["targets"]
    logits = dense.hidden @ dense.head_weight.T + dense.head_bias
    sparse = problem | {"targets": topk(logits, V)}
    gradients = torch.autograd.grad(fused_loss(**sparse).total, leaves(sparse))
    expected = torch.autograd.grad(fused_loss(**problem).total, leaves(problem))
    torch.testing.assert_close(fused_loss(**sparse).total, fused_loss(**problem).total)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@every_divergence
def test_topk_is_a_lower_bound_that_grows_with_k(divergence):
    problem = make_problem("dense", divergence=divergence)
    dense = problem["targets"]
    logits = dense.hidden @ dense.head_weight.T + dense.head_bias
    values = [float(fused_loss(**(problem | {"targets": topk(logits, k)})).kd_sum) for k in (1, 2, 4, 8, V - 1)]
    values.append(float(fused_loss(**problem).kd_sum))
    assert all(fewer <= more + 1e-12 for fewer, more in itertools.pairwise(values))
    assert values[0] < 0.99 * values[-1]


@every_divergence
@pytest.mark.parametrize("teacher", ["dense", "topk"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zero_without_gradient_when_student_is_teacher(divergence, teacher, temperature):
    problem = make_problem(teacher, divergence=divergence, temperature=temperature)
    hidden, weight = problem["hidden"].detach(), problem["head_weight"].detach()
    problem["targets"] = DenseTargets(hidden, weight) if teacher == "dense" else topk(hidden @ weight.T, 4)
    problem["ce_coef"] = torch.zeros(N)
    result = fused_loss(**problem)
    result.total.backward()
    assert result.total.abs() < 1e-13
    if divergence.name != "tvd":  # which has a kink there, so rounding decides
        assert problem["hidden"].grad.abs().max() < 1e-13


@every_divergence
@every_teacher
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_finite_at_logit_gaps_of_200(divergence, teacher, temperature):
    logits = torch.tensor([[200.0, 0.0, -200.0, 0.0], [-200.0, 200.0, 0.0, 0.0], [0.0, 0.0, 0.0, 200.0]])
    teacher_logits = logits.flip(1)
    targets = {
        "dense": DenseTargets(teacher_logits, torch.eye(4)),
        "topk": topk(teacher_logits, 2),
        "topk_all": topk(teacher_logits, 4),
        "ragged": ragged(teacher_logits),
    }[teacher]
    weight, ones = torch.eye(4, requires_grad=True), torch.ones(3)
    loss = fused_loss(
        logits.requires_grad_(),
        weight,
        torch.tensor([2, 0, 0]),
        ce_coef=ones,
        kd_coef=ones,
        targets=targets,
        divergence=divergence,
        temperature=temperature,
    )
    loss.total.backward()
    assert loss.total.isfinite() and loss.ce_sum == 1000.0 and loss.kd_sum > 0
    assert logits.grad.isfinite().all() and weight.grad.isfinite().all()


@every_divergence
def test_topk_with_a_tail_of_nothing_is_finite(divergence):
    problem = cast(make_problem("topk", divergence=divergence), torch.float32)
    targets = problem["targets"]
    problem["targets"] = TopKTargets(targets.ids, targets.log_probs, torch.full((N,), -torch.inf))
    result = fused_loss(**problem)
    result.total.backward()
    assert result.total.isfinite()
    assert all(x.grad.isfinite().all() for x in leaves(problem))


def test_a_tiny_tail_is_exact():
    logits = torch.tensor([[40.0, 39.0, -1.0, -2.0, -3.0]], requires_grad=True)
    targets = TopKTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log(), torch.tensor([0.1]).log())
    one = torch.ones(1)
    zero = torch.zeros(1)
    loss = fused_loss(
        logits, torch.eye(5), zero.long(), ce_coef=zero, kd_coef=one, targets=targets, divergence=FORWARD_KL
    )
    log_student = logits.detach().double().log_softmax(-1)[0]
    student = torch.stack([log_student[0], log_student[1], log_student[2:].logsumexp(0)])
    teacher = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    assert loss.total.item() == pytest.approx((teacher * (teacher.log() - student)).sum().item(), rel=1e-5)
    loss.total.backward()
    torch.testing.assert_close(logits.grad[0, 2:].sum(), torch.tensor(-0.1), rtol=1e-5, atol=0)


@every_teacher
def test_temperature_squared_reaches_the_gradient(teacher):
    problem = make_problem(teacher, temperature=3.0) | {"ce_coef": torch.zeros(N)}
    plain = fused_loss(**problem, scale_by_temperature_squared=False)
    scaled = fused_loss(**problem, scale_by_temperature_squared=True)
    torch.testing.assert_close(scaled.kd_sum, 9.0 * plain.kd_sum)
    for gradient, without in zip(
        torch.autograd.grad(scaled.total, leaves(problem)),
        torch.autograd.grad(plain.total, leaves(problem)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, 9.0 * without)


def test_sums_are_the_parts_of_the_total_and_carry_no_gradient():
    problem = make_problem(temperature=2.0)
    both = fused_loss(**problem)
    ce_only = fused_loss(**(problem | {"kd_coef": torch.zeros(N), "targets": None}))
    kd_only = fused_loss(**(problem | {"ce_coef": torch.zeros(N)}))
    torch.testing.assert_close(both.ce_sum, ce_only.total.detach())
    torch.testing.assert_close(both.kd_sum, kd_only.total.detach())
    torch.testing.assert_close(both.total.detach(), both.ce_sum + both.kd_sum)
    assert both.total.requires_grad and not both.ce_sum.requires_grad and not both.kd_sum.requires_grad


@pytest.mark.parametrize("rows", [0, N])
def test_nothing_supervised_is_zero_with_a_zero_gradient(rows):
    problem = make_problem(bias=True)
    for name in ("hidden", "labels"):
        problem[name] = problem[name].detach()[:rows].clone()
    problem["hidden"].requires_grad_()
    problem |= {"ce_coef": torch.zeros(rows), "kd_coef": torch.zeros(rows), "targets": None}
    result = fused_loss(**problem)
    result.total.backward()
    assert result.total == 0.0 and result.head_rows == 0
    assert all((x.grad == 0).all() for x in leaves(problem))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    problem = make_problem("topk", bias=True)
    expected = fused_loss(**problem).total.detach()
    with mode():
        result = fused_loss(**problem)
    assert result.total == expected and not result.total.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_half_types_and_autocast_are_close_to_float32(teacher, dtype):
    exact = cast(make_problem(teacher), torch.float32)
    wanted = torch.autograd.grad(fused_loss(**exact).total, leaves(exact))
    half = exact | {name: exact[name].detach().to(dtype).requires_grad_() for name in ("hidden", "head_weight")}
    got = torch.autograd.grad(fused_loss(**half).total, leaves(half))
    with torch.autocast("cpu", dtype):
        mixed = fused_loss(**exact).total
    assert fused_loss(**half).total.dtype == mixed.dtype == torch.float32
    for gradient, under_autocast, expected in zip(got, torch.autograd.grad(mixed, leaves(exact)), wanted, strict=True):
        assert gradient.dtype == dtype and under_autocast.dtype == torch.float32
        torch.testing.assert_close(gradient.float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(under_autocast, expected, rtol=0.05, atol=0.05)


def test_the_heads_gradient_is_handed_over_not_copied():
    problem = make_problem()
    total = fused_loss(**problem).total
    known = {tensor.data_ptr() for tensor in total.grad_fn.saved_tensors if tensor is not None}
    total.backward()
    assert problem["head_weight"].grad.data_ptr() in known


def test_backward_twice_accumulates():
    problem = make_problem()
    total = fused_loss(**problem).total
    once = torch.autograd.grad(total, leaves(problem), retain_graph=True)
    total.backward(retain_graph=True)
    total.backward(2.0 * torch.ones_like(total), retain_graph=True)
    for x, gradient in zip(leaves(problem), once, strict=True):
        torch.testing.assert_close(x.grad, 3.0 * gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((N,), V)}, f"label {V} at row 1 is outside the vocabulary of {V}"),
        ({"labels": torch.full((N,), -100)}, "label -100 at row 1"),
        ({"targets": None}, "targets is None"),
        ({"targets": topk(torch.randn(N - 1, V), 3)}, f"{N - 1} teacher targets for {N} rows"),
        ({"targets": topk(torch.randn(N, V + 5), V + 5)}, "top-k id 1[3-7] at row 0 is outside"),
        ({"ce_coef": torch.ones(N + 1)}, "ce_coef"),
        ({"kd_coef": torch.ones(N, 1)}, "kd_coef"),
        ({"head_weight": torch.randn(V, D + 1)}, "head_weight"),
        ({"head_bias": torch.randn(V + 1)}, "head_bias"),
        ({"vocab_size": V + 1}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ShapeError, match=message):
        fused_loss(**(make_problem() | change))


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"temperature": float("nan")}, {"chunk_bytes": 0}])
def test_settings_that_are_not_positive_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        fused_loss(**(make_problem() | change))


@pytest.mark.gpu
@every_divergence
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_accelerator_equals_cpu(divergence, teacher):
    problem = cast(make_problem(teacher, bias=True, divergence=divergence), torch.float32)
    moved = {
        name: value.detach().cuda().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in problem.items()
    }
    targets = problem["targets"]
    fields = {f.name: getattr(targets, f.name).cuda() for f in dataclasses.fields(targets)}
    moved["targets"] = type(targets)(**fields)
    gradients = torch.autograd.grad(fused_loss(**moved).total, leaves(moved))
    expected = torch.autograd.grad(fused_loss(**problem).total, leaves(problem))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.cpu(), wanted, rtol=1e-4, atol=1e-4)


@every_teacher
def test_capped_logits_of_student_and_teacher(teacher):
    problem = make_problem(teacher, divergence=FORWARD_KL)
    problem["targets"] = make_targets(teacher)
    if isinstance(problem["targets"], DenseTargets):
        problem["targets"] = dataclasses.replace(problem["targets"], head_softcap=1.5)
    loss = fused_loss(**problem, head_softcap=2.0)
    inputs = [problem["hidden"], problem["head_weight"]]
    found = torch.autograd.grad(loss.total, inputs)
    # The plain twin over an identity head, whose "hidden states" are the capped logits.
    capped = 2.0 * torch.tanh(problem["hidden"] @ problem["head_weight"].T / 2.0)
    targets = problem["targets"]
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.head.logits(targets.hidden), torch.eye(V, dtype=torch.float64))
    plain = problem | {"hidden": capped, "head_weight": torch.eye(V, dtype=torch.float64), "targets": targets}
    whole = fused_loss(**plain).total
    assert torch.allclose(loss.total, whole, rtol=1e-10)
    for mine, theirs in zip(found, torch.autograd.grad(whole, inputs), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)
