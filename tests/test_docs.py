"""The documentation: its commands parse, its options, files and links exist."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from options.base_options import BaseOptions
from options.test_options import TestOptions
from options.train_options import TrainOptions
from util.find_class import available_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, type[BaseOptions]] = {"train.py": TrainOptions, "test.py": TestOptions}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
# what a file of the repository looks like in inline code
REPOSITORY_FOLDERS = "data|datasets|docs|models|options|scripts|tests|util"
REPOSITORY_PATH = re.compile(
    rf"(?:\./)?((?:{REPOSITORY_FOLDERS})/[\w./-]*|[\w-]+\.(?:py|sh|toml|md|txt))"
)
# inside of `datasets/` and `data/` there is also what users put there
MADE_BY_USERS = re.compile(r"(datasets|data)/(?!worldmaps_mini)[\w-]+(/|$)")
# files of the experiment's folder, which look like files of ours
EXPERIMENT_FILES = {"train_opt.txt", "test_opt.txt", "loss_log.txt"}
OTHER_PROGRAMS = ("pip", "#SBATCH", "ssh", "scontrol", "srun", "sbatch", "torchrun")


# ------------------------------------------------------------------------- reading of the pages
def commands_of(text: str) -> list[list[str]]:
    """The simple commands in the shell blocks of a page, as words."""
    commands = []
    for language, block in FENCE.findall(text):
        if language not in ("bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            command: list[str] = []
            for word in lexer:
                if set(word) <= set(";&|"):
                    commands.append(command)
                    command = []
                else:
                    command.append(word)
            commands.append(command)
    return [c for c in commands if c]


def program_of(command: list[str]) -> tuple[str, list[str]] | None:
    """The script or `-m module` that a command starts and its arguments; None for other programs.

    Words in front (`srun`, `NAME=value`, `do`) are passed over.
    """
    if "torchrun" in command:
        # its own options come before the program
        first = next((i for i, word in enumerate(command) if word in PROGRAMS), None)
        return None if first is None else (command[first], command[first + 1 :])
    for i, word in enumerate(command):
        if Path(word).name in ("python", "python3", "bash"):
            rest = command[i + 1 :]
            if rest[:1] == ["-m"]:
                return f"-m {rest[1]}", rest[2:]
            return (rest[0], rest[1:]) if rest else None
    return None


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


@functools.cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def started() -> list[tuple[str, str, tuple[str, ...]]]:
    """Page, program and arguments of each command in the docs, in shell blocks and inline."""
    found = []
    for page in PAGES:
        commands = commands_of(read(page))
        for code in INLINE.findall(without_fences(read(page))):
            if re.match(r"(python3?|bash) [-\w]", code):
                commands.append(shlex.split(code))
        for command in commands:
            if program := program_of(command):
                found.append((page.name, program[0], tuple(program[1])))
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------ what there is
def parser_of(options: type[BaseOptions], model: str, mode: str) -> argparse.ArgumentParser:
    made = options(["--dataroot", ".", "--model", model, "--dataset_mode", mode])
    made.gather_options()
    return made.parser


@functools.cache
def parsers() -> dict[tuple[str, str], argparse.ArgumentParser]:
    """The parser of each program for each model and, for one model, each dataset."""
    every = {}
    for program, options in PROGRAMS.items():
        for model in available_names("models", "model"):
            if model == "test" and program == "train.py":
                continue
            for mode in available_names("data", "dataset") if model == "cycle_gan" else ["aligned"]:
                every[program, f"{model}/{mode}"] = parser_of(options, model, mode)
    return every


@functools.cache
def own_flags() -> frozenset[str]:
    """Every option of train.py and test.py, of any model and dataset."""
    return frozenset(
        flag for p in parsers().values() for a in p._actions for flag in a.option_strings
    )


@functools.cache
def help_of(program: str) -> str:
    """What a script, or `-m module`, prints for --help; run here, where torch is imported."""
    script = ROOT / program
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [program, "--help"])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        patch.setattr(signal, "signal", lambda *a: None)  # the tools handle SIGTERM
        run, what = runpy.run_path, str(script)
        if program.startswith("-m "):
            run, what = runpy.run_module, program[3:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module may be imported already
            with pytest.raises(SystemExit) as end:
                run(what, run_name="__main__")
    assert not end.value.code, f"{program} --help ends with {end.value.code}"
    return printed.getvalue()


@functools.cache
def tools() -> frozenset[str]:
    """The Python programs of this repository, beside train.py and test.py, that the docs start."""
    programs = {program for _, program, _ in started()} - PROGRAMS.keys()
    scripts = {p for p in programs if p.endswith(".py") and (ROOT / p).is_file()}
    modules = {p for p in programs if p.startswith(("-m util.", "-m data."))}
    return frozenset(scripts | {m for m in modules if importlib.util.find_spec(m[3:])})


@functools.cache
def tool_flags() -> dict[str, frozenset[str]]:
    return {name: frozenset(FLAG.findall(help_of(name))) for name in sorted(tools())}


# -------------------------------------------------------------------------------------- the tests
def test_pages_are_found():
    assert len(PAGES) >= 6
    assert len(started()) > 25


def ids(command: tuple[str, str, tuple[str, ...]]) -> str:
    return f"{command[0]}:{command[1]} {' '.join(command[2])}"[:100]


@pytest.mark.parametrize("command", started(), ids=ids)
def test_command(command, tmp_path, monkeypatch, capsys):
    """Each command names a program that exists, with options that it takes."""
    _, program, arguments = command
    if program in PROGRAMS:
        # away from the experiments that this checkout may have, and without writing anything
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(BaseOptions, "save", lambda *a: pytest.fail("options were saved"))
        monkeypatch.setattr(
            "options.base_options.select_device", lambda ids: ([], torch.device("cpu"))
        )
        words = [w for w in arguments if w != "--help"]
        if words != list(arguments):
            words += ["--dataroot", "."]
        try:
            PROGRAMS[program](words).parse(save=False)
        except SystemExit:
            pytest.fail(capsys.readouterr().err.strip() or "the parser ended the program")
    elif program.startswith("-m "):
        assert importlib.util.find_spec(program[3:]), f"there is no module {program[3:]}"
        if program in tools():
            check_flags(program, arguments)
    else:
        assert (ROOT / program).is_file(), f"there is no {program}"
        if program.endswith(".sh"):
            check_shell_flags(program, arguments)
        else:
            check_flags(program, arguments)


def check_flags(program: str, arguments: tuple[str, ...]) -> None:
    known = tool_flags()[program] if program in tools() else set(FLAG.findall(help_of(program)))
    if program == "scripts/benchmark.py":  # what it does not know goes to train.py or test.py
        known = known | own_flags()
    for flag in FLAG.findall(" ".join(arguments)):
        assert flag in known, f"{program} has no {flag}"


def check_shell_flags(program: str, arguments: tuple[str, ...]) -> None:
    """A shell script either names the flag itself or passes it on to train.py or test.py."""
    text = read(ROOT / program)
    passes_on = re.search(r"/(train|test)\.py", text) and '"$@"' in text
    to_pytest = program == "scripts/run_tests.sh"
    for flag in FLAG.findall(" ".join(arguments)):
        assert flag in text or (passes_on and flag in own_flags()) or to_pytest, (
            f"{program} knows no {flag}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_flags_in_text_exist(page):
    everything = own_flags().union(*tool_flags().values())
    unknown = []
    for code in INLINE.findall(without_fences(read(page))):
        if code.startswith(OTHER_PROGRAMS):
            continue
        extra = set()
        if script := re.search(r"[\w./]+\.sh", code):
            extra = set(FLAG.findall(read(ROOT / script.group())))
        unknown += [f for f in FLAG.findall(code) if f not in everything | extra | {"--help"}]
    assert not unknown, f"{page.name} names options that nothing has: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = [t for t in LINK.findall(without_fences(read(page))) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t.split("#")[0]).exists()]
    assert not missing, f"{page.name} links to what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page):
    missing = []
    for code in INLINE.findall(without_fences(read(page))):
        for word in code.split():
            match = REPOSITORY_PATH.fullmatch(word)
            if not match or "/." in word:
                continue
            path = match.group(1)
            ours = not MADE_BY_USERS.match(path) or path.endswith((".py", ".sh"))
            if ours and path not in EXPERIMENT_FILES and not (ROOT / path).exists():
                missing.append(path)
    assert not missing, f"{page.name} names files that are not there: {missing}"


def test_defaults_in_text_are_the_defaults():
    """`--load_size` (286): a number in brackets behind an option is the default of some model."""
    wrong = []
    for page in PAGES:
        for flag, number in re.findall(r"`(--\w+)` \((\d[\d.]*)[);]", without_fences(read(page))):
            defaults = {
                a.default
                for p in parsers().values()
                for a in p._actions
                if flag in a.option_strings and isinstance(a.default, (int, float))
            }
            if float(number) not in defaults:
                wrong.append(f"{page.name}: {flag} ({number}), it is {defaults}")
    assert not wrong, wrong


def test_every_source_file_is_explained():
    """The overview has each Python file of the packages and each script."""
    text = read(ROOT / "docs" / "overview.md") + read(ROOT / "docs" / "datasets.md")
    text += read(ROOT / "README.md")
    folders = ("models", "options", "data", "util", "scripts", "datasets")
    files = [p for f in folders for pattern in ("*.py", "*.sh") for p in (ROOT / f).rglob(pattern)]
    there = [p.relative_to(ROOT).as_posix() for p in files if p.stat().st_size]
    quiet = {"options/__init__.py", "util/__init__.py"}
    unexplained = sorted(p for p in there if p not in text and p not in quiet)
    assert not unexplained, f"docs/overview.md does not have {unexplained}"


@pytest.mark.parametrize("which", sorted(parsers()), ids=" ".join)
def test_every_option_has_help(which):
    silent = [a.option_strings[-1] for a in parsers()[which]._actions if not a.help]
    assert not silent


# ----------------------------------------------------------- the tests themselves find something
def test_commands_are_taken_apart():
    text = (
        "x\n```bash\nsrun python train.py --a 'b c' && \\\n  bash s.sh; ls\n```\n"
        "```text\npython x\n```\n"
    )
    commands = commands_of(text)
    assert [program_of(c) for c in commands] == [("train.py", ["--a", "b c"]), ("s.sh", []), None]


@pytest.mark.parametrize(
    "arguments", ["--no_such_option", "--netG resnet_8blocks", "--model nope", "--batch_size 0"]
)
def test_a_wrong_command_is_noticed(arguments, tmp_path, monkeypatch, capsys):
    command = ("x.md", "train.py", ("--dataroot", ".", *arguments.split()))
    with pytest.raises(pytest.fail.Exception):
        test_command(command, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        ("datasets/combine_A_and_B.py", ("--fold_C", "x")),
        ("datasets/nothing.py", ()),
        ("scripts/train_cyclegan.sh", ("--no_such_option",)),
        ("-m util.nothing", ()),
    ],
)
def test_a_wrong_tool_is_noticed(command, tmp_path, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        test_command(("x.md", *command), tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_flags_in_text_exist, "`--no_such_option`"),
        (test_links_lead_somewhere, "[a](docs/nothing.md)"),
        (test_named_files_exist, "`models/nothing.py`"),
        (test_named_files_exist, "`datasets/worldmaps_mini/nothing`"),
    ],
)
def test_a_wrong_page_is_noticed(check, text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError):
        check(page)


def test_the_example_of_a_loss_of_ones_own(tmp_path):
    """Run as a file of `models/`: the new loss is shown, and part of what the generators learn."""
    blocks = [block for _, block in FENCE.findall(read(ROOT / "docs" / "own_models.md"))]
    (example,) = [block for block in blocks if "compute_G_loss" in block]
    scope: dict = {"__name__": "models.tv_cycle_gan_model", "__package__": "models"}
    exec(example, scope)
    words = "--dataroot none --model cycle_gan --gpu_ids -1 --netG resnet_6blocks --ngf 2 --ndf 2"
    opt = TrainOptions([*words.split(), "--checkpoints_dir", str(tmp_path)]).parse(save=False)
    model = scope["TVCycleGANModel"](opt)
    sides = {side: torch.rand(1, 3, 32, 32) for side in "AB"}
    model.set_input({**sides, "A_paths": [""], "B_paths": [""]})
    model.optimize_parameters()
    losses = model.get_current_losses()
    assert losses["TV"] > 0
    parts = sum(value for name, value in losses.items() if not name.startswith("D_"))
    assert model.loss_G.item() == pytest.approx(parts, rel=1e-5)
