"""The shell scripts: they parse, install once, repair what was interrupted, and fail in one line.

Nothing is downloaded: a copy of the script runs with a real virtual environment and a false pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *sorted(ROOT.glob("scripts/*.sh")),
    *sorted(ROOT.glob("datasets/*.sh")),
    ROOT / ".ci/run",
]

# Stands for pip in the environments that the tests make. It writes down how it was called, and
# "installs" by creating what setup.sh looks for: a module and its metadata.
FALSE_PIP = """
import os, pathlib, sys, sysconfig

root = pathlib.Path(sysconfig.get_path("purelib"))  # of the Python that runs it
args = sys.argv[1:]
if args == ["--version"]:
    sys.exit(print("pip 0"))
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*args, file=calls)
mode = os.environ.get("FALSE_PIP", "works")
if mode == "offline":
    print("WARNING: Retrying after connection broken by 'NewConnectionError'", file=sys.stderr)
    sys.exit("ERROR: No matching distribution found for torch")
if mode == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: No space left on device")


def install(module, distribution):
    if list(root.glob(f"{distribution}-*.dist-info")):
        return  # as the real one, it believes the metadata
    info = root / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (root / module).mkdir(exist_ok=True)
    (root / module / "__init__.py").touch()
    if mode == "killed" and module == "torchvision":
        os._exit(137)
    (info / "RECORD").touch()


if args[-1].endswith("requirements-demo.txt"):
    install("gradio", "gradio")
elif "-r" in args:
    for pair in "torch:torch torchvision:torchvision numpy:numpy PIL:pillow skimage:scikit_image \\
        dominate:dominate tqdm:tqdm matplotlib:matplotlib visdom:visdom tornado:tornado".split():
        install(*pair.split(":"))
"""

# Stands for the Python that makes the environment.
BASE_PYTHON = """#!/bin/sh
if [ "$1" = -m ] && [ "$2" = venv ]; then
    "{python}" -m venv --without-pip "$3" "$4" || exit 1
    for site in "$4"/lib/python3*/site-packages; do
        mkdir "$site/pip" && cp "{pip}" "$site/pip/__main__.py" && touch "$site/pip/__init__.py"
    done
    exit 0
fi
exec "{python}" "$@"
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def bash(script: Path | str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *args],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def link_tools(folder: Path, *tools: str) -> Path:
    """A folder to be the whole PATH: these programs and no others."""
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} here"))
    return folder


class Copy:
    """A folder with setup.sh and the requirement files, and the environment that it makes."""

    def __init__(self, folder: Path):
        self.root = folder / "a copy"  # a space in the path must not matter
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.root / "scripts")
        for file in (*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt"):
            shutil.copy(file, self.root)
        self.calls = folder / "pip calls"
        pip = folder / "false pip.py"
        pip.write_text(FALSE_PIP, encoding="utf-8")
        text = BASE_PYTHON.format(python=sys.executable, pip=pip)
        self.python = write_script(folder / "python3", text)

    def setup(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {"PYTHON": str(self.python), "PIP_CALLS": str(self.calls), **env}
        return bash(self.root / "scripts/setup.sh", *args, **env)

    def take_calls(self) -> list[str]:
        """The false pip's command lines since the last time."""
        if not self.calls.exists():
            return []
        lines = self.calls.read_text(encoding="utf-8").splitlines()
        self.calls.unlink()
        return lines

    @property
    def site(self) -> Path:
        return next((self.root / ".venv/lib").glob("python3*/site-packages"))


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def assert_one_line(run: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    assert run.returncode == code
    assert len(run.stderr.splitlines()) == 1, run.stderr
    for word in words:
        assert word in run.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_is_valid_bash(path: Path):
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert os.access(path, os.X_OK), f"chmod +x {path.name}"
    run = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# ---------------------------------------------------------------------------------------- setup.sh
def test_setup_installs_once(copy: Copy):
    first = copy.setup()
    assert first.returncode == 0, first.stderr
    assert "6 GB" in first.stdout
    calls = copy.take_calls()
    # visdom's set-up needs an old setuptools, and to be built where that one is
    assert "setuptools>=77.0.3,<81 wheel" in calls[0]
    assert "--no-build-isolation" in calls[1]
    assert calls[1].endswith("/requirements.txt")
    assert "-c" in calls[1].split()
    assert "/constraints.txt -r " in calls[1]

    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        again = copy.setup()
        seconds.append(time.monotonic() - begun)
    assert min(seconds) < 1
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert copy.take_calls() == []


def test_setup_takes_the_newest_releases(copy: Copy):
    assert copy.setup("--newest").returncode == 0
    assert "constraints.txt" not in "".join(copy.take_calls())
    assert copy.setup("--newest").stdout == ""
    # the tested versions may be others
    assert copy.setup().returncode == 0
    assert "constraints.txt" in "".join(copy.take_calls())


def test_constraints_have_what_is_required():
    """The exact versions are within the bounds, and nothing that is required lacks one."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            pinned[requirement.name] = str(requirement.specifier).removeprefix("==")
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                requirement = Requirement(line)
                version = pinned[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version), requirement


def test_setup_dev_adds_to_what_is_there(copy: Copy):
    copy.setup()
    copy.take_calls()
    assert copy.setup("--dev").returncode == 0
    asked = [c.rsplit("/", 1)[-1] for c in copy.take_calls()]
    assert asked == ["requirements-dev.txt", "requirements-demo.txt"]
    assert copy.setup("--dev").stdout == copy.setup().stdout == copy.setup("--demo").stdout == ""
    assert copy.take_calls() == []


def test_setup_demo_is_a_place_beside_the_rest(copy: Copy):
    assert copy.setup("--demo").returncode == 0
    own = next((copy.root / ".venv/demo/lib").glob("python3*/site-packages"))
    assert (own / "gradio").is_dir()
    assert not (copy.site / "gradio").exists()
    # what it has itself hides what .venv has, and the rest of .venv is there
    (own / "PIL").mkdir()
    (own / "PIL/__init__.py").touch()
    code = "import gradio, torch, PIL\nfor m in gradio, torch, PIL: print(m.__file__)"
    python = copy.root / ".venv/demo/bin/python"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    folders = [Path(path).parents[1] for path in found.stdout.splitlines()]
    assert folders == [own, copy.site, own]
    assert copy.setup("--demo").stdout == ""

    shutil.rmtree(copy.root / ".venv/demo")
    copy.take_calls()
    assert copy.setup().stdout == ""  # not asked for
    assert copy.setup("--demo").returncode == 0
    assert copy.take_calls()[-1].endswith("requirements-demo.txt")
    assert (own / "gradio-1.0.dist-info").exists()


def test_setup_notices_changed_requirements(copy: Copy):
    copy.setup()
    copy.take_calls()
    with open(copy.root / "requirements.txt", "a", encoding="utf-8") as f:
        f.write("# changed\n")
    assert copy.setup().returncode == 0
    assert len(copy.take_calls()) == 1


def test_setup_repairs_an_interrupted_installation(copy: Copy):
    killed = copy.setup(FALSE_PIP="killed")
    assert killed.returncode == 1
    assert (copy.site / "torchvision-1.0.dist-info").exists()
    assert copy.setup().returncode == 0
    assert (copy.site / "torchvision-1.0.dist-info/RECORD").exists()
    assert (copy.site / "torchvision/__init__.py").exists()


def test_setup_replaces_an_environment_whose_python_is_gone(copy: Copy):
    copy.setup()
    (copy.root / ".venv/bin/python").unlink()
    run = copy.setup()
    assert run.returncode == 0, run.stderr
    assert "broken" in run.stdout


def test_setup_takes_an_environment_made_by_hand(copy: Copy):
    subprocess.run([copy.python, "-m", "venv", "--clear", copy.root / ".venv"], check=True)
    marker = copy.root / ".venv/mine"
    marker.touch()
    assert copy.setup().returncode == 0
    assert marker.exists()


def test_setup_goes_on_without_the_live_page(copy: Copy):
    write_script(copy.root / "scripts/setup_visdom.sh", "#!/bin/sh\necho no net >&2\nexit 1\n")
    run = copy.setup()
    assert run.returncode == 0
    assert "visdom's page is not ready" in run.stdout


def test_setup_hands_its_python_to_setup_visdom(copy: Copy):
    write_script(
        copy.root / "scripts/setup_visdom.sh", '#!/bin/sh\necho "$1" > "$PIP_CALLS.visdom"'
    )
    assert copy.setup().returncode == 0
    given = Path(f"{copy.calls}.visdom").read_text(encoding="utf-8").strip()
    assert given == str(copy.root / ".venv/bin/python")


def test_setup_error_lines(copy: Copy):
    assert_one_line(copy.setup(PYTHON="/nowhere/python3"), "/nowhere/python3", "3.10")
    old = write_script(copy.root.parent / "old", "#!/bin/sh\nexit 1\n")
    assert_one_line(copy.setup(PYTHON=str(old)), str(old), "3.10")
    assert_one_line(copy.setup(FALSE_PIP="offline"), "no network", "setup.log")
    assert_one_line(copy.setup(FALSE_PIP="full"), "the disk is full")
    # a failure is not taken for success the next time
    assert_one_line(copy.setup(FALSE_PIP="offline"), "no network")


def test_setup_without_any_python(copy: Copy, tmp_path: Path):
    tools = link_tools(tmp_path / "tools", "bash", "dirname", "head", "cat", "cksum", "rm", "sed")
    run = copy.setup(PATH=str(tools), PYTHON="")
    assert_one_line(run, "no Python of 3.10 or newer on PATH", "PYTHON=")


def test_setup_help(copy: Copy):
    run = copy.setup("--help")
    assert run.returncode == 0
    assert run.stdout.startswith("Make .venv")
    assert not (copy.root / ".venv").exists()


def test_a_wrong_command_line(copy: Copy):
    assert_one_line(copy.setup("--devel"), "'--devel'; allowed: --demo, --dev, --newest", code=2)
    assert not (copy.root / ".venv").exists()
    outside = bash(ROOT / "scripts/train_slurm.sh", "--name", "x")
    assert_one_line(outside, "not in a job of Slurm; start it with sbatch", code=2)


# -------------------------------------------------------------------------- run_tests.sh, .ci/run
def test_run_tests_hands_on_its_arguments(tmp_path: Path):
    script = tmp_path / "scripts/run_tests.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts/run_tests.sh", script)
    write_script(script.with_name("setup.sh"), 'echo "setup $*"\n')
    write_script(tmp_path / ".venv/bin/python", '#!/bin/sh\nfor a; do echo "<$a>"; done\nexit 3\n')
    run = bash(script, "-k", "one or two")
    assert run.returncode == 3
    lines = run.stdout.splitlines()
    assert lines[0] == "setup --dev"
    assert lines[1:3] == ["<-m>", "<pytest>"]
    assert lines[-2:] == ["<-k>", "<one or two>"]


def ci_copy(folder: Path, broken: str | None = None) -> Path:
    """.ci/run with stand-ins for all that it calls, one of which may fail."""
    status = {name: int(name == broken) for name in ("tests", "ruff", "pyright")}
    write_script(folder / "scripts/run_tests.sh", f"exit {status['tests']}\n")
    for name in ("ruff", "pyright"):
        write_script(folder / f".venv/bin/{name}", f"#!/bin/sh\nexit {status[name]}\n")
    return write_script(folder / ".ci/run", (ROOT / ".ci/run").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("broken", "code"), [(None, 0), ("tests", 1), ("ruff", 1), ("pyright", 1)])
def test_ci_runs_every_step(tmp_path: Path, broken: str | None, code: int):
    ci = ci_copy(tmp_path, broken)
    write_script(tmp_path / "bin/chromium", "#!/bin/sh\n")
    run = bash(ci, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert run.returncode == code
    failed = {None: 0, "tests": 1, "ruff": 2, "pyright": 1}[broken]
    assert run.stdout.count("FAILED") == failed
    assert run.stdout.count("ci:   ok") == 4 - failed
    last = f"ci: {failed} of 4 steps failed" if failed else "ci: all 4 steps passed"
    assert run.stdout.splitlines()[-1] == last


def test_ci_goes_on_without_chromium(tmp_path: Path):
    ci = ci_copy(tmp_path)
    tools = link_tools(tmp_path / "tools", "bash", "sh", "dirname")
    write_script(tools / "apt-get", "#!/bin/sh\nexit 100\n")
    run = bash(ci, PATH=str(tools))
    assert run.returncode == 0, run.stdout
    assert "chromium could not be installed by apt-get" in run.stdout


# ----------------------------------------------------------------------------------- quickstart.sh
def commands_of_quickstart(folder: Path, gpu: bool) -> tuple[list[list[str]], str]:
    """Run the script with a Python that only writes down its arguments."""
    script = folder / "scripts/quickstart.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts/quickstart.sh", script)
    write_script(script.with_name("setup.sh"), "exit 0\n")
    write_script(
        folder / ".venv/bin/python",
        f"""#!/bin/sh
case "$2" in *cuda*) exit {int(not gpu)};; esac
printf '%s\\t' "$@" >> calls
echo >> calls
mkdir -p results/quickstart/test_latest && touch results/quickstart/test_latest/index.html
""",
    )
    run = bash(script)
    assert run.returncode == 0, run.stderr
    calls = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[:-1] for line in calls], run.stdout


@pytest.mark.parametrize("gpu", [False, True])
def test_quickstart_gives_commands_that_parse(tmp_path: Path, gpu: bool):
    from options.test_options import TestOptions
    from options.train_options import TrainOptions

    (train, test), output = commands_of_quickstart(tmp_path, gpu)
    if not gpu:
        assert train[0] == "-c"
        assert "launch(2, sys.argv[1:])" in train[1]
        train = train[2:]
    assert (train[0], test[0]) == ("train.py", "test.py")
    opt = TrainOptions(train[1:]).gather_options()
    assert opt.batch_size == 1 + gpu  # two images a step either way
    opt_test = TestOptions(test[1:]).gather_options()
    assert opt.gpu_ids == opt_test.gpu_ids == ("0" if gpu else "-1")
    assert (opt.name, opt.model, opt.dataroot) == (opt_test.name, opt_test.model, opt_test.dataroot)
    assert (ROOT / opt.dataroot / "testA").is_dir()
    page = output.splitlines()[-1].split(" open ")[1]
    assert Path(page).is_absolute()
    assert Path(page).exists()


def test_quickstart_takes_no_arguments():
    run = bash(ROOT / "scripts/quickstart.sh", "--epochs", "3")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "--epochs 3" in run.stderr
