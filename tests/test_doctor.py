"""`limbeck doctor`: what it says of a machine, good and bad, and that its numerical tests tell a wrong routine."""

import json
from importlib import metadata

import pytest
import torch

from limbeck import doctor, selftest
from limbeck.cli import main
from limbeck.doctor import Check, Diagnosis, DoctorConfig
from limbeck.engine.native.build import Missing


@pytest.fixture
def page(monkeypatch):
    """The page of a machine of which single parts are made up."""

    def made(**parts):
        monkeypatch.setattr(doctor, "_numerics", lambda: iter([Check("numerics", "good", "not tested here")]))
        for name, value in parts.items():
            monkeypatch.setattr(doctor, name, value)
        return {check.about: check for check in doctor.run(DoctorConfig()).checks}

    return made


def test_one_page_about_this_machine(page):
    found = page()
    for about in ("limbeck", "libraries", "products", "threads", "memory", "disk here", "compiler", "numerics"):
        assert found[about].found
    assert metadata.version("torch") in found["libraries"].found
    assert all(check.state != "wrong" for check in found.values()), found
    assert all(check.advice for check in found.values() if check.state != "good" and check.about != "memory")


def test_the_command_prints_the_page_or_json(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 0
    tree = json.loads(capfd.readouterr().out)
    assert tree["is_sound"] is True and {"about", "state", "found", "advice"} == set(tree["checks"][0])
    doctor.show(Diagnosis((Check("numerics", "good", "all"),)))
    assert "numerics" in (text := "".join(capfd.readouterr())) and "Nothing is wrong." in text


def test_what_is_wrong_ends_with_exit_code_1(monkeypatch, capfd):
    monkeypatch.setattr(
        doctor, "_numerics", lambda: iter([Check("Cholesky", "wrong", "wrong by 30 %", "another torch")])
    )
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1 and "wrong: Cholesky" in "".join(capfd.readouterr())


def test_a_missing_library_and_an_old_one_are_wrong(page, monkeypatch):
    versions = {"torch": "1.0", "pydantic": None}
    own = doctor._version
    found = page(_version=lambda name: versions.get(name, own(name)) if name in versions else own(name))
    assert found["torch"].state == "wrong" and "pip install 'torch" in found["torch"].advice
    assert found["pydantic"].found == "missing"


def test_too_many_threads_too_little_memory_and_no_compiler_are_notes(page):
    def no_compiler():
        raise Missing("there is no C++ compiler")

    found = page(_cores=lambda: 0, _available_bytes=lambda: 2**30, library=no_compiler)
    assert found["threads"].state == found["memory"].state == found["compiler"].state == "note"
    assert "OMP_NUM_THREADS" in found["threads"].advice and "no C++ compiler" in found["compiler"].found


def test_every_routine_that_limbeck_uses_is_right_here():
    before = torch.get_num_threads()
    outcomes = selftest.run(2)
    assert torch.get_num_threads() == before
    assert {outcome.threads for outcome in outcomes} == {1, 2}
    assert all(outcome.is_right for outcome in outcomes if outcome.routine.is_used)


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_wrong_routine_is_told(fault, monkeypatch):
    right = torch.linalg.cholesky

    def broken(matrix):
        found = right(matrix)
        if torch.get_num_threads() == 1 or matrix.dtype == torch.float64:
            return found
        if fault == "raises":
            raise RuntimeError("no such routine")
        return found * (1.04 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(torch.linalg, "cholesky", broken)
    wrong = {(outcome.routine.name, outcome.threads) for outcome in selftest.run(2) if not outcome.is_right}
    assert ("Cholesky", 2) in wrong and ("Cholesky solve", 2) in wrong
    assert not any(threads == 1 for name, threads in wrong)


def test_a_wrong_routine_is_on_the_page(monkeypatch):
    routine = next(r for r in selftest._routines() if r.name == "Cholesky")
    monkeypatch.setattr(selftest, "run", lambda threads: [selftest.RoutineResult(routine, 2, 0.3)])
    told = {check.about: check for check in doctor._numerics()}
    assert told["Cholesky"].state == "wrong" and told["Cholesky"].found == "wrong by 30.0% on 2 threads"


def test_a_routine_that_limbeck_avoids_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: 0 * b)
    routine = next(r for r in selftest._routines() if not r.is_used)
    outcome = selftest.RoutineResult(routine, 2, 0.4)
    assert not outcome.is_right
    monkeypatch.setattr(selftest, "run", lambda threads: [outcome])
    (_, told) = doctor._numerics()
    assert told.state == "note" and "set_num_threads(1)" in told.advice
    assert Diagnosis((told,)).is_sound
