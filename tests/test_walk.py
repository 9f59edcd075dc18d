"""Every console block of README.md and docs/ runs as printed, page by page, in a shell that has what a new user's has.

About fifteen minutes on two cores. `.venv/bin/pytest -m slow tests/test_walk.py` runs it; `-k README` takes one page.

A page is one shell session in one clone. README begins in a fresh clone; the other pages begin where its first block
ends, with the environment activated as README says. `make setup` isn't run: each clone gets a `.venv` that shares the
packages of the running one, as the other tests' projects do.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, environment, passed

PAGES = [
    path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
]  # the examples' reports are made by `ablab`; they have no console blocks

# What a page prints and this test does not run: page, first command of the block, command, reason. Nothing else is left
# out, and what a page no longer prints has to go from here.
NETWORK = "the network: downloads Fashion-MNIST"
HOURS = "hours"
GRID = "needs the grid or the search before it, which take hours and the network"
GPU = "a GPU"
NODE = "another machine"
TEAM = "root, or another machine with a name of its own; tests/test_team.py runs it with servers of its own"
PLACEHOLDER = "a placeholder that the reader fills in"
LEFT_OUT = {
    ("README.md", "make repro", "make test"): "the suite that this test is a part of; CI runs it",
    ("README.md", "ablab studies", "ablab quick"): NETWORK,
    ("README.md", "ablab studies", "dvc repro"): HOURS,
    ("README.md", "ablab use scenes_squeezenet", "dvc repro"): "the network: downloads ImageNet weights",
    ("README.md", "make gpu", "make gpu"): GPU,
    ("docs/benchmarks.md", "make benchmarks", "make benchmarks"): HOURS,
    ("docs/benchmarks.md", "make benchmarks", 'make benchmarks ONLY="quickstart loop"'): HOURS,
    ("docs/benchmarks.md", "make benchmarks", "python benchmarks/run.py --small"): "half an hour",
    ("docs/examples/README.md", "cp docs/examples/fashion_layers/params.yaml params.yaml", "dvc repro"): HOURS,
    ("docs/parallel.md", "CUDA_VISIBLE_DEVICES=0,1 ablab repro", "CUDA_VISIBLE_DEVICES=0,1 ablab repro"): GPU,
    (
        "docs/parallel.md",
        "dvc cache dir --local /shared/dvc-cache",
        "dvc cache dir --local /shared/dvc-cache",
    ): "a folder that several machines share",
    ("docs/parallel.md", "export RAY_AUTH_MODE=token", "ssh ..."): NODE,
    ("docs/parallel.md", "export RAY_AUTH_MODE=token", "scp ..."): NODE,
    ("docs/parallel.md", "export RAY_AUTH_MODE=token", "ray start ..."): NODE,
    (
        "docs/parallel.md",
        "ablab repro --engine ray --address 10.0.0.1:6379",
        "ablab repro --engine ray --address 10.0.0.1:6379",
    ): NODE,
    (
        "docs/report.md",
        "inkscape --export-type=pdf reports/figures/accuracy.svg",
        "inkscape --export-type=pdf reports/figures/accuracy.svg",
    ): "another program, which few machines have",
    ("docs/report.md", "python benchmarks/report.py", "python benchmarks/report.py"): "a benchmark: minutes",
    ("docs/search.md", "ablab use fashion_grid", "dvc repro"): NETWORK,
    (
        "docs/search.md",
        "ablab use fashion_grid",
        'git add dvc.lock params.yaml && git commit -m "The grid\'s base"',
    ): GRID,
    ("docs/search.md", "dvc exp run --queue ...", "dvc exp run --queue ..."): HOURS,
    ("docs/search.md", "dvc exp run --queue ...", "dvc exp run --run-all -j 2"): HOURS,
    ("docs/search.md", "ablab search ...", "ablab search ..."): HOURS,
    ("docs/search.md", "dvc exp show ...", "dvc exp show ..."): GRID,
    ("docs/search.md", "dvc exp apply NAME", "dvc exp apply NAME"): PLACEHOLDER,
    ("docs/search.md", "dvc exp apply NAME", "dvc exp run -S study.test=scored"): GRID,
    ("docs/team.md", "sudo -u postgres createuser mlflow ...", "sudo -u postgres createuser mlflow --pwprompt"): TEAM,
    ("docs/team.md", "sudo -u postgres createuser mlflow ...", "sudo -u postgres createdb mlflow --owner mlflow"): TEAM,
    ("docs/team.md", "export AWS_ACCESS_KEY_ID=… ...", "export AWS_ACCESS_KEY_ID=… ..."): PLACEHOLDER,
    ("docs/team.md", "export AWS_ACCESS_KEY_ID=… ...", "mkdir -p /srv/objects/mlflow /srv/objects/dvc"): TEAM,
    ("docs/team.md", "export AWS_ACCESS_KEY_ID=… ...", "rclone serve s3 /srv/objects ..."): TEAM,
    ("docs/team.md", "export AWS_ACCESS_KEY_ID=… ...", "mlflow server --host 0.0.0.0 ..."): PLACEHOLDER,
    ("docs/team.md", "export MLFLOW_TRACKING_URI=http://server:5000", "export AWS_ACCESS_KEY_ID=… ..."): PLACEHOLDER,
    ("docs/team.md", "dvc repro", "dvc push"): TEAM,
    ("docs/team.md", "dvc pull", "dvc pull"): TEAM,
}  # comments are left away, and "..." ends a beginning

PATIENCE = 3600  # seconds for a page

# What a user does in an editor, as the page's comment says.
TYPED = {
    "nano params.yaml": """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
random = np.random.default_rng(0)
for kind in ("indoor", "outdoor"):
    (Path("photographs") / kind).mkdir(parents=True)
    for number in range(30):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), "uint8")).save(f"photographs/{kind}/{number}.png")
lines = Path("params.yaml").read_text().splitlines()
lines = ["  path: photographs" if line.startswith("  path:") else line for line in lines]
Path("params.yaml").write_text("\\n".join(line for line in lines if not line.startswith("  pictures:")) + "\\n")
"""
}
# Commands that end when the user presses Ctrl-C, and where they answer until then.
SERVERS = {"ablab ui": "http://127.0.0.1:5000/health", "mlflow models serve": "http://127.0.0.1:5001/ping"}
ANSWERS = """
import sys, time, urllib.request
for _ in range(600):
    try:
        sys.exit(urllib.request.urlopen(sys.argv[1], timeout=5).status != 200)
    except OSError:
        time.sleep(0.5)
sys.exit("no answer: " + sys.argv[1])
"""


@dataclass
class Block:
    """A fenced block of a page; `commands` of a console block, without prompts."""

    page: str
    line: int
    language: str
    commands: list[str]

    def left_out(self, command: str) -> tuple[str, str, str] | None:
        """The entry of the list that a command is meant by."""
        for entry in LEFT_OUT:
            if entry[0] == self.page and means(entry[1], self.commands[0]) and means(entry[2], command):
                return entry
        return None


def means(entry: str, command: str) -> bool:
    bare = re.sub(r"\s+#.*", "", command)
    return bare == entry or (entry.endswith("...") and bare.startswith(entry.removesuffix("...").rstrip()))


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in re.finditer(r"^( *)```(console|python)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        body, line = textwrap.dedent(fence[3]), text[: fence.start()].count("\n") + 1
        commands = [body]
        if fence[2] == "console":
            assert body.startswith("$ "), f"{page}, line {line}: a console block begins with `$ `"
            commands = [one.rstrip("\n") for one in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]]
            extra = [one for one in commands if "\n" in re.sub(r"\\\n", "", one)]
            assert not extra, f"{page}, line {line}: output, or a line without `$ ` or `\\`: {extra}"
        found.append(Block(page, line, fence[2], commands))
    return found


def script(found: list[Block]) -> str:
    """The blocks as one session of bash that ends with the first command that fails."""
    lines = [f"answers() {{ python - \"$1\" <<'ANSWERS'{ANSWERS}ANSWERS\n}}"]
    for block in found:
        if block.language == "python":
            # A block that defines something, such as a network's module, prints and computes nothing.
            if "print(" in block.commands[0]:
                lines += [called(block, f"python - <<'PYTHON'\n{block.commands[0]}PYTHON")]
            continue
        for command in block.commands:
            if block.left_out(command):
                continue
            typed = next((text for start, text in TYPED.items() if command.startswith(start)), None)
            server = next((place for start, place in SERVERS.items() if command.startswith(start)), None)
            if typed:
                lines.append(called(block, f"python - <<'TYPED'{typed}TYPED"))
            elif server:
                lines.append(called(block, f"setsid {command} & server=$!; answers {server}"))
                lines.append("kill -TERM -- -$server; wait $server")
            else:
                lines.append(called(block, command))
    return "\n".join([*lines, "echo '== the end'", ""])


def called(block: Block, command: str) -> str:
    first = command.replace("'", "").splitlines()[0]
    return f"echo '== {block.page}, line {block.line}: {first}'\n{command}\n[ $? -eq 0 ] || exit 1"


def shell(home: Path) -> dict[str, str]:
    """What a new user's shell has, without this test's own environment of Python."""
    own = str(Path(sys.executable).parent)
    places = [place for place in os.environ["PATH"].split(os.pathsep) if place and place != own]
    return {"PATH": os.pathsep.join(places), "HOME": str(home), "LANG": "C.UTF-8"}


def walk(clone: Path, found: list[Block], *before: str) -> None:
    """Run blocks in a clone; `before` are commands of an earlier page."""
    for start, place in SERVERS.items():
        port = int(place.split(":")[2].partition("/")[0])
        if any(command.startswith(start) for block in found for command in block.commands):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)), f"port {port} is in use, and a page prints it"
    text = "\n".join([*before, script(found)])
    with (clone.parent / "session.log").open("w+") as log:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=clone,
            env=shell(clone.parent / "home"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            timeout=PATIENCE,
        )
        log.seek(0)
        told = log.read()
    assert done.returncode == 0 and told.endswith("== the end\n"), told[-6000:]


def set_up(clone: Path) -> None:
    """What `make setup` leaves."""
    environment(clone)
    (clone / ".venv/.ready-requirements.lock").touch()


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A clone in which README's first block has been run."""
    place = tmp_path_factory.mktemp("walk")
    bare, origin, clone = shell(place / "home"), place / "origin", place / "project"

    def git(*arguments: str, cwd: Path) -> str:
        return passed(subprocess.run(["git", *arguments], cwd=cwd, env=bare, capture_output=True, text=True))

    (place / "home").mkdir()
    git("config", "--global", "user.name", "A user", cwd=place)
    git("config", "--global", "user.email", "user@example.org", cwd=place)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, origin / name)
    git("init", "--quiet", cwd=origin)
    git("add", "--all", cwd=origin)
    git("commit", "--quiet", "--message", "the working tree", cwd=origin)
    git("clone", "--quiet", str(origin), str(clone), cwd=place)
    set_up(clone)
    python = 'from PIL import Image; Image.new("L", (28, 28)).save("picture.png")'  # a picture of the user's
    subprocess.run([clone / ".venv/bin/python", "-c", python], cwd=clone, check=True)
    walk(clone, blocks("README.md")[:1])
    return clone


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs_as_printed(begun: Path, tmp_path: Path, page: str):
    clone, found = tmp_path / "project", blocks(page)
    if not script(found).count("== ") > 1:
        return  # nothing to run
    shutil.copytree(begun, clone, symlinks=True)
    shutil.copytree(begun.parent / "home", tmp_path / "home", symlinks=True)
    set_up(clone)
    if page == "README.md":
        walk(clone, found[1:])
    else:
        walk(clone, found, "source .venv/bin/activate")


def test_what_is_left_out_is_still_printed():
    meant = {block.left_out(command) for page in PAGES for block in blocks(page) for command in block.commands}
    assert [entry for entry in LEFT_OUT if entry not in meant] == []
    run = [one for page in PAGES for block in blocks(page) for one in block.commands if not block.left_out(one)]
    assert [one for one in run if re.match(r"(sudo|ssh|scp|ray start|rclone serve|mlflow server)\b", one)] == []
    printed = [command for page in PAGES for block in blocks(page) for command in block.commands]
    assert [start for start in (*TYPED, *SERVERS) if not any(one.startswith(start) for one in printed)] == []
