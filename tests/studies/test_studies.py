"""The studies: runs side by side are the runs alone, an interrupted study goes on, and its laws hold at small size."""

import json
import math
import re
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import limbeck
import studies
from limbeck.errors import CheckpointError, ConfigError
from limbeck.optim import AGLD, ASGLD
from limbeck.optim.theory import escape_slope, predicted_escape_steps
from studies import cells, escape, race, rates, saddles
from studies.fit import fit_line, lower_median, median_interval, slope_interval
from studies.methods import METHODS, Settings
from studies.page import cell_text, markdown_table
from studies.problems import QuarticSaddle
from studies.swarm import Swarm, run_until

SETTINGS = Settings(lr=0.2)


def alone(make, num_steps):
    problem = QuarticSaddle(num_dims=12)
    param = torch.nn.Parameter(torch.zeros(12))
    optimizer = make([param])
    for _ in range(num_steps):
        param.grad = problem.gradient(param.detach())
        optimizer.step()
    return param.detach()


def test_a_run_in_a_swarm_ends_with_the_bits_of_the_run_alone():
    problem = QuarticSaddle(num_dims=12)
    swarm = Swarm(problem, METHODS["agld"], SETTINGS, torch.zeros(3, 12), [5, 6, 7])
    for step in range(40):
        if step == 10:
            swarm.keep(torch.tensor([True, False, True]))
        swarm.step(None)
    for row, seed in zip(swarm.points, (5, 7), strict=True):
        single = alone(
            lambda params, seed=seed: AGLD(
                params, 0.2, grad_threshold=SETTINGS.grad_threshold, noise_radius=SETTINGS.noise_radius, seed=seed
            ),
            40,
        )
        assert torch.equal(row, single)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_steps_and_leaves_the_point_finite(name):
    method = METHODS[name]
    swarm = Swarm(QuarticSaddle(num_dims=4), method, SETTINGS, torch.full((2, 4), 0.1), [0, 1])
    for _ in range(5):
        swarm.step(16 if method.is_stochastic else None)
    assert swarm.points.isfinite().all()
    assert (swarm.points != 0.1).all()


def test_arrivals_count_steps_and_samples_and_keep_the_end_points():
    problem = QuarticSaddle(num_dims=2)
    starts = torch.tensor([[0.9, 0.0], [0.2, 0.0], [0.0, 0.0]])
    swarm = Swarm(problem, METHODS["sgd"], Settings(lr=0.5), starts, [0, 1, 2])
    arrivals = run_until(
        swarm, lambda points, step: points[:, 0].abs() >= 0.5, 30, lambda step: None if step < 2 else 1_000_000 + step
    )
    assert arrivals.steps[0] == 0
    assert arrivals.samples[0] == 0
    taken = int(arrivals.steps[1])
    assert 0 < taken < 30
    assert arrivals.samples[1] == sum(1_000_000 + step for step in range(2, taken))
    assert math.isinf(arrivals.steps[2])
    assert (arrivals.points[:2, 0].abs() >= 0.5).all()
    assert arrivals.points[2, 0].abs() < 0.5


def test_fits_recover_a_line_and_its_interval_covers_the_slope():
    generator = np.random.default_rng(0)
    x = [1.0, 2.0, 3.0, 4.0]
    groups = [list(5 + 2 * value + generator.normal(size=200)) for value in x]
    line = fit_line(x, [5 + 2 * value for value in x])
    assert line.slope == pytest.approx(2.0)
    assert line.r_squared == pytest.approx(1.0)
    low, high = slope_interval(x, groups)
    assert low < 2.0 < high
    assert high - low < 0.5


def test_medians_bear_runs_that_never_arrive():
    assert lower_median([1.0, math.inf, 3.0]) == 3.0
    assert math.isinf(lower_median([1.0, math.inf, math.inf]))
    low, high = median_interval([1.0, 2.0, 3.0, math.inf, math.inf])
    assert low < high
    assert math.isinf(high)
    assert cell_text(math.inf) == "never"
    assert markdown_table((("a", "b"), [("x", 1.23456), ("y", None)])).splitlines()[2:] == [
        "| x | 1.235 |",
        "| y | – |",
    ]


def small_escape(**changes):
    fields = {"dims": (10, 100, 1000), "num_seeds": 41, "null_seeds": 21, "num_workers": 1, "control_steps": 200}
    return escape.EscapeConfig(**{**fields, **changes})


def test_escape_time_is_affine_in_ln_d_with_the_predicted_slope_and_flat_for_noise_per_coordinate(tmp_path):
    config = small_escape(methods=("agld",), num_seeds=81)
    result = escape.run(config, tmp_path / "out")
    found = result["methods"]["agld"]
    assert found["predicted_slope"] == escape_slope(config.lr, config.negative_curvature)
    assert found["slope_over_predicted"] == pytest.approx(1, abs=0.2)
    assert found["slope_low"] < found["predicted_slope"] < found["slope_high"]
    assert abs(found["per_coordinate_slope"]) < 0.3
    assert result["control_num_left"] == 0
    expected = predicted_escape_steps(config.lr, config.negative_curvature, 100, config.noise_radius, config.distance)
    assert found["medians"]["100"] == pytest.approx(expected, abs=4)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["methods"]["agld"]["slope"] == found["slope"]
    page = (tmp_path / "out" / "page.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert (tmp_path / "out" / "escape.png").stat().st_size > 1000
    assert "| agld |" in (tmp_path / "out" / "table.md").read_text()


def test_mini_batch_methods_escape_by_gradient_noise(tmp_path):
    config = small_escape(methods=("asg",), null_seeds=0)
    found = escape.measure(config, tmp_path / "cells.jsonl")["methods"]["asg"]
    assert found["slope_over_predicted"] == pytest.approx(1, abs=0.35)
    assert found["per_coordinate_slope"] is None


def test_the_real_optimizer_escapes_as_the_two_scalar_oracle_does():
    """One kick, then noiseless steps: |a| grows from the size of one coordinate of r zeta, and y only shrinks."""
    config = small_escape()
    cell = ("agld", "energy", 1000, 0, 101)
    measured = escape.measure_cell(config, cell)["steps"]
    kicks = config.noise_radius * np.abs(np.random.default_rng(0).normal(size=4001)) / math.sqrt(1000)
    gamma, steps = config.negative_curvature, np.ones(len(kicks))
    while (inside := kicks < config.distance).any():
        steps += inside
        kicks = kicks + config.lr * gamma * (kicks - kicks**3)
    assert np.median(measured) == pytest.approx(np.median(steps), abs=2.5)


def test_an_interrupted_study_goes_on_and_ends_with_the_same_result(tmp_path):
    config = small_escape(methods=("agld",), num_seeds=5, null_seeds=5)
    whole = escape.measure(config, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[:3]) + '\n[["agld", "ener')
    assert escape.measure(config, tmp_path / "cut.jsonl") == whole
    assert sorted((tmp_path / "cut.jsonl").read_text().splitlines()[1:]) == sorted(lines[1:])


def test_cells_of_another_config_are_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells.measure_cells(_double, {"a": 1}, [(1,), (2,)], path, "cells", 1)
    assert cells.measure_cells(_fail, {"a": 1}, [(1,), (2,)], path, "cells", 1) == {(1,): {"x": 2}, (2,): {"x": 4}}
    with pytest.raises(CheckpointError, match="another config"):
        cells.measure_cells(_double, {"a": 2}, [(1,)], path, "cells", 1)


def _double(config, cell):
    return {"x": 2 * cell[0]}


def _fail(config, cell):
    raise AssertionError("measured again")


@pytest.mark.parametrize(("problem", "epsilons"), [("quartic_saddle", (0.1, 0.07)), ("valley_saddle", (0.25, 0.18))])
def test_converge_finds_exponents_within_the_claims_and_second_order_points(tmp_path, problem, epsilons):
    config = rates.RatesConfig(
        problem=problem, epsilons=epsilons, num_dims=30, num_seeds=3, seeds_per_cell=3, num_workers=1
    )
    result = rates.run(config, tmp_path / "out")
    for schedule, claim in {"constant": 4, "growing": 2, "full": 2}.items():
        found = result[schedule]
        assert found["arrived_fraction"] == 1
        assert found["second_order_fraction"] == 1
        assert found["iterations_exponent"] < claim + 1
    assert result["full"]["samples_exponent"] is None
    smallest = f"{min(epsilons):g}"
    assert result["growing"]["median_samples"][smallest] > result["growing"]["median_steps"][smallest]
    assert result["constant"]["median_samples"] == result["constant"]["median_steps"]
    assert (tmp_path / "out" / "page.html").exists()


def test_a_point_with_a_small_gradient_at_a_saddle_has_not_arrived():
    config = rates.RatesConfig(num_dims=30)
    problem = rates.make_problem(config)
    test = rates._arrival_test(problem, 0.1, 0.5, 20)
    (minimum, _) = problem.facts().minima
    points = torch.stack([torch.zeros(30), minimum, torch.full((30,), 0.5)])
    assert test(points, 0).tolist() == [False, True, False]


def test_race_tunes_each_method_and_draws_paths(tmp_path):
    config = race.RaceConfig(
        methods=("gd", "agld"), lrs=(0.01, 0.1), tune_seeds=2, num_seeds=3, max_steps=400, num_workers=1
    )
    result = race.run(config, tmp_path / "out")
    assert result["methods"]["gd"]["median_steps"] is None
    assert result["methods"]["agld"]["lr"] == 0.1
    assert result["methods"]["agld"]["arrived_fraction"] == 1
    assert (tmp_path / "out" / "paths.png").stat().st_size > 1000
    assert (tmp_path / "out" / "page.html").read_text().count("data:image/png") == 2
    assert race.race_table(result)[1][0][0] == "agld"


def test_configs_refuse_what_cannot_work():
    with pytest.raises(ConfigError, match="did you mean 'asgld'"):
        escape.EscapeConfig(methods=("asgdl",))
    with pytest.raises(ValueError, match="dims"):
        escape.EscapeConfig(dims=(10,))
    with pytest.raises(ValueError, match=r"gamma\^2"):
        rates.RatesConfig(epsilons=(0.5, 0.1))
    with pytest.raises(ConfigError, match="target_loss"):
        race.RaceConfig(problem="monkey_saddle")
    with pytest.raises(ConfigError, match="random"):
        race.RaceConfig(problem="dictionary_learning", target_loss=0.1)
    with pytest.raises(ConfigError, match="octopus"):
        race.RaceConfig(problem="octopusy")


@pytest.mark.parametrize("study", [escape, race, rates, saddles], ids=lambda study: study.__name__)
def test_every_study_is_a_command_whose_flags_are_the_fields_of_its_config(study, tmp_path, monkeypatch, capsys):
    name = study.__name__.removeprefix("studies.")
    monkeypatch.setattr("sys.argv", [name, "--num-sedes", "3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(study.__file__, run_name="__main__")
    assert stopped.value.code == 2
    assert "num_seeds" in capsys.readouterr().err


def test_a_study_writes_where_it_is_told_and_prints_its_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "race"
    words = (
        "--problem quartic_saddle --size 4 --methods [agld] --lrs [0.5] --tune-seeds 1 --num-seeds 3 --num-workers 1"
    )
    monkeypatch.setattr("sys.argv", ["race", *words.split(), "--out", str(out)])
    runpy.run_path(race.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == (out / "table.md").read_text().strip()
    monkeypatch.setattr("sys.argv", ["race", *words.split(), "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(race.__file__, run_name="__main__")
    assert "exists" in capsys.readouterr().err


def test_the_package_does_not_need_the_studies():
    package = Path(limbeck.__file__).parent
    assert not [
        path for path in package.rglob("*.py") if re.search(r"^\s*(from|import) studies", path.read_text(), re.M)
    ]
    root = Path(studies.__file__).parent.parent
    found = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert found["include"] == ["limbeck*"]


def test_asgld_without_noise_leaves_an_axis_aligned_saddle_never():
    param = alone(lambda params: ASGLD(params, 0.2, grad_threshold=0.02, noise_radius=0.0), 50)
    assert not param.any()
