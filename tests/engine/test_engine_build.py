"""Compiled kernels on disk: a file that is not whole is made anew and never loaded."""

import pytest
from kernels_here import kernels_here

from limbeck.engine.native import build

pytestmark = pytest.mark.skipif("compiled" not in kernels_here(), reason="no C++ compiler")


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A library that is compiled at once, in a cache of its own; each look-up is the first."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return build.library.__wrapped__


def only_file(tmp_path):
    (file,) = (tmp_path / "cache" / "limbeck").glob("*.so")
    return file


@pytest.mark.parametrize("spoil", [lambda data: data[:700], lambda data: b"", lambda data: b"\0" * len(data)])
def test_a_spoiled_file_is_made_anew(small_source, tmp_path, spoil):
    assert small_source().answer() == 42
    file = only_file(tmp_path)
    whole = file.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(spoil(whole))
    cut.replace(file)  # another file under the name, as after a crash; what is loaded stays what it was
    assert small_source().answer() == 42
    assert only_file(tmp_path).read_bytes() == whole


def test_a_whole_file_is_compiled_once(small_source, tmp_path, monkeypatch):
    small_source()
    monkeypatch.setattr(build, "_compile", None)
    assert small_source().answer() == 42
