"""Every block of code in README and docs is tested: YAML becomes a config, commands are understood, Python runs.

The tutorials are run as a whole, command after command, in an empty directory (slow).
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from docs_blocks import PAGES, PROSE, ROOT, SHELL, TUTORIALS, Block, all_blocks, blocks_of, commands_of

import limbeck.library
from limbeck import stage
from limbeck.cli import load_command, read_config, take_options
from limbeck.commands import COMMANDS
from limbeck.commands import named as command_named
from limbeck.config import build
from limbeck.flags import apply_flags
from limbeck.help import fields_of
from limbeck.yaml_values import read_recipe
from studies.command import read as read_study

CHAIN = {"source": "builtin:chain", "num_traces": 9}
LEFT_OUT = {
    "distill": {"student.model": "tiny-student", "traces": CHAIN},
    "sweep": {"distill.student.model": "tiny-student", "distill.traces": CHAIN, "problems": CHAIN},
    "rank train": {"student.model": "tiny-student"},
}
"""Required fields that a part of a recipe may leave to its reader, by command."""
SCORER = "from docs_blocks import save_text_model\nsave_text_model({!r})\n"
BEFORE = {
    "scoring.md": SCORER.format("runs/ranker-w8a8")
    + "member_and_history, candidates = 'Liked: Fargo\\n', ['Item: Heat\\nAnswer:', 'Item: Big\\nAnswer:']",
    "generation.md": SCORER.format("runs/student-w8a8") + SCORER.format("runs/draft"),
    "optimizers.md": "import torch\nmodel = torch.nn.Linear(3, 1)\n"
    "first_half, second_half = torch.randn(2, 4, 3)\nloss_of = lambda inputs: model(inputs).square().mean()",
}
"""What the reader of a page has before its first block."""
READS_OUTPUTS = ("rank evaluate", "rank recover")
"""Their configs are completed from the directories that they name."""
LANGUAGES = {*SHELL, *PROSE, "python", "yaml", "json"}
PROGRAMS = {"limbeck", "make", "pip", "python", "pytest", "torchrun", "curl", "ray", "serve", "sh", "source"}
PROGRAMS |= {"until", "kill", "wait"}


def named(blocks: list[Block]) -> list:
    return [pytest.param(block, id=block.name) for block in blocks]


def test_every_block_says_what_it_is():
    blocks = [block for page in {block.page for block in all_blocks(*LANGUAGES)} for block in blocks_of(page)]
    assert len(blocks) > 40
    assert {block.language for block in blocks} <= LANGUAGES, [b.name for b in blocks if b.language not in LANGUAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_ends(page):
    fences = [line for line in page.read_text().splitlines() if line.lstrip().startswith("```")]
    assert [fence.strip() == "```" for fence in fences] == [False, True] * (len(fences) // 2)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("README.md", "index.md")], ids=str)
def test_a_page_with_commands_shows_python_beside_them(page):
    blocks = blocks_of(page)
    commands = [line for block in blocks if block.language in SHELL for line in commands_of(block.text)]
    if any(re.search(r"(^|-m )limbeck ", command) for command in commands):
        assert any(block.language == "python" and "limbeck" in block.text for block in blocks)


@pytest.mark.parametrize("block", named(all_blocks("yaml")))
def test_yaml_becomes_a_config(block):
    kind, _, command = block.mark.partition(": ")
    assert kind in ("recipe of", "part of"), f"{block.name}: say what it is, <!-- part of: COMMAND -->"
    config, tree = load_command(command).config, yaml.safe_load(block.text)
    build(config, tree if kind == "recipe of" else completed(command, tree), block.name)


def completed(command, tree):
    """A part of a recipe with what it leaves to its reader."""
    for path, value in LEFT_OUT.get(command, {}).items():
        *groups, leaf = path.split(".")
        place = tree
        for name in groups:
            place = place.setdefault(name, {})
        place.setdefault(leaf, value)
    return tree


@pytest.mark.parametrize("block", named(all_blocks(*SHELL)))
def test_commands_are_understood(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(completed("distill", {})))
    for other in blocks_of(block.page):
        if other.file:
            (tmp_path / other.file).write_text(other.text)
    for command in commands_of(block.text):
        check(command)


def check(command: str) -> None:
    if re.match(r"\w+=\$\(", command):
        return
    words = shlex.split(command, comments=True)
    while re.match(r"\w+=", words[0]) or words[0] == "srun":
        words = words[1:]
    program, rest = words[0], words[1:]
    assert program.split("/")[-1] in PROGRAMS, command
    if program == "torchrun":
        rest = rest[rest.index("limbeck") :]
        program, rest = rest[0], rest[1:]
    if program == "limbeck" and rest != ["--help"]:
        rest = rest[: rest.index("&")] if "&" in rest else rest
        name, arguments = command_named(rest)
        row = load_command(name)
        _, arguments = take_options(row, arguments)
        if name in READS_OUTPUTS:
            recipe = read_recipe(Path(arguments.pop(0))) if not arguments[0].startswith("--") else {}
            apply_flags(row.config, recipe, arguments)
        else:
            read_config(row, arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in rest), command
    elif program == "python" and rest[:1] == ["-m"] and rest[1].startswith("studies."):
        study = importlib.import_module(rest[1])
        configs = [found for name, found in vars(study).items() if name.endswith("Config")]
        (config_class,) = (found for found in configs if found.__module__ == study.__name__)
        read_study(config_class, rest[1], rest[2:])
    elif program in ("python", "pytest"):
        files = [word for word in rest if word.endswith(".py")]
        assert all((ROOT / file).is_file() or Path(file).is_file() for file in files), command
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [extra for found in re.findall(r"limbeck\[([^]]+)\]", command) for extra in found.split(",")]
        assert set(asked) <= extras.keys(), command
    elif program == "curl":
        bodies = [rest[index + 1] for index, word in enumerate(rest) if word in ("-d", "--data")]
        assert all(isinstance(json.loads(body), dict) for body in bodies), command


def test_commands_in_the_readme_are_understood():
    """Those of its table; a flag without its value is a mention, not a command."""
    found = re.findall(r"`(limbeck [^`]+)`", (ROOT / "README.md").read_text())
    commands = [command for command in found if not command.endswith("--engine")]
    assert len(commands) > 15
    for command in commands:
        check(command)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))], ids=lambda page: page.name
)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as a reader would paste them; of a tutorial, those of its commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in blocks_of(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    names: dict = {}
    exec(BEFORE.get(page.name, ""), names)
    for block in blocks_of(page):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, block.name, "exec")
        if not block.is_run:
            with monkeypatch.context() as patch:
                patch.setattr(limbeck.library, "call", understood)
                exec(code, names)
        elif page not in TUTORIALS:  # they are run as a whole, below
            exec(code, names)


def understood(command, subjects, fields):
    """In the place of a call: its config is made, and nothing is run."""
    options = {name: fields[name] for name in fields if name in command.options}
    rest = {name: value for name, value in fields.items() if name not in options}
    where = f"limbeck.{stage.function_name(command.name)}"
    tree = stage.tree_of(command, subjects, rest, where)
    if command.name not in READS_OUTPUTS:
        build(command.config, tree, where)
    return limbeck.Checkpoint(Path(options.get("out", "runs/out")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_an_empty_directory(page, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in blocks_of(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
        elif block.language == "python" and block.is_run:
            run([sys.executable, "-c", block.text], tmp_path)
        elif block.language in SHELL and block.is_run:
            run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path)


def run(command: list[str], directory) -> None:
    """Run to a good end; what it leaves behind (a server, say) goes with it."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    log = directory / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(1200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, f"{command[-1]}\n{log.read_text()}"


def test_methods_name_files_that_exist():
    text = (ROOT / "docs" / "methods.md").read_text()
    files = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(files) > 40
    assert [
        file for file in sorted(files) if not (ROOT / "limbeck" / file).is_file() and not (ROOT / file).is_file()
    ] == []


def test_the_reference_has_every_command_and_field():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    sections = re.split(r"^## limbeck ", hooks.cli_page(), flags=re.M)[1:]
    assert [section.partition("\n")[0] for section in sections] == list(COMMANDS)
    for section, command in zip(sections, COMMANDS.values(), strict=True):
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        command = command.load()
        fields = fields_of(command)
        assert [re.match(r"\| `(\S+)`", row)[1] for row in rows] == [field.path for field in fields]
        assert all(row.count(" | ") == 3 for row in rows)
        options = set(re.search(r"Options: (.*)", section)[1].replace("`", "").split(", "))
        assert options >= {"--" + name.replace("_", "-") for name in command.options}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "cli/index.html", "tutorials/distil/index.html", "benchmarks/results/serve.png"):
        assert (tmp_path / "site" / page).is_file()
