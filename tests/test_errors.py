"""How a command ends: every refusal is the operating system's own, made for one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from namespaces import allowed, full_disk, read_only

from ablation_lab import errors, files

# Each writes 2 MB or more in its library's way, below the folder that it is given.
WRITERS = {
    "numpy": "np.save(folder / 'a.npy', np.zeros(300_000))",
    "several arrays": "np.savez(folder / 'a.npz', np.zeros(300_000), np.zeros(300_000))",
    "text": "(folder / 'a').write_text('x' * 3_000_000)",
    "json": "files.write_json(folder / 'a.json', ['word'] * 400_000)",
    "pandas": "import pandas; pandas.DataFrame({'a': range(500_000)}).to_csv(folder / 'a.csv')",
    "hdf5": "import h5py; h5py.File(folder / 'a.h5', 'w').create_dataset('a', data=np.zeros(300_000))",
    "zip": "import zipfile\nwith zipfile.ZipFile(folder / 'a.zip', 'w') as one: one.writestr('a', bytes(3_000_000))",
    "png": "from PIL import Image; Image.frombytes('L', (1500, 2000), large.read_bytes()).save(folder / 'a.png')",
    "copies": "import shutil; shutil.copytree(large.parent, folder / 'copies')",
    "sqlite": "import sqlite3; one = sqlite3.connect(folder / 'a.db'); one.execute('create table a (b)');"
    "one.execute('insert into a values (?)', ('x' * 3_000_000,)); one.commit()",
}

# Every writer tries; told is what a user would see of each.
ALL = """
import sys
from pathlib import Path
import numpy as np
from ablation_lab import errors, files
large = Path(sys.argv[1])
for name, line in WRITERS.items():
    try:
        with files.whole(Path("out") / name.replace(" ", "_")) as folder:
            exec(line)
    except Exception as error:
        print(f"{name}: {errors.explanation(error) or repr(error)}")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "large/file").write_bytes(os.urandom(3_000_000))
    return tmp_path


def code(script: str) -> tuple[str, ...]:
    # The library of the working tree, which `run` looks for beside the project.
    return sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{script}"


def test_a_full_disk_is_told_whichever_library_finds_it(place: Path):
    script = f"WRITERS = {WRITERS!r}\n{ALL}"
    done = run(place, *full_disk(place / "out", 500, *code(script), str(place / "large/file")))
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(told) == set(WRITERS), done.stderr
    for name, text in told.items():
        assert text.startswith(f"out/{name.replace(' ', '_')}"), text
        assert "Expected room on the disk. Found: No space left on device (" in text
        assert "MB are free). Remove files, or move the project to a larger disk." in text
    assert list((place / "out").iterdir()) == []  # no part of what was not written


def test_a_folder_that_is_read_only_is_told(place: Path):
    script = "from ablation_lab import errors, files\nfrom pathlib import Path\n"
    script += "with errors.explained(), files.whole(Path('out/cell')): pass"
    done = run(place, *read_only(place / "out", *code(script)))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "\nerror: out/cell.part: Expected a folder that can be written to. Found: Read-only file system. Make it "
        "writable (mount options, owner, permissions). What was finished is kept, and the same command goes on from "
        "there.\n"
    )


@pytest.mark.parametrize(
    ("limit", "line", "message"),
    [
        ("-f 1", "open('out/a', 'wb').write(bytes(10_000))", "Found: File too large. Raise the limit (`ulimit -f"),
        ("-n 20", "kept = [open('/dev/null') for _ in range(30)]", "/dev/null: Expected to be allowed one open file"),
        ("-c 0", "open('/proc/self/mem', 'rb').read(1)", "Expected a disk that works. Found: Input/output error. See"),
        ("-v 3000000", "bytearray(10**10)", "memory: Expected more of it. Found: none left. End other programs"),
        (
            "-v 3000000",
            "import numpy; numpy.zeros(10**10)",
            "memory: Expected more of it. Found: Unable to allocate 74.5 GiB for an array",
        ),
    ],
)
def test_a_limit_of_the_system_is_told(place: Path, limit: str, line: str, message: str):
    script = f"from ablation_lab import errors\nwith errors.explained(exit_status=2): {line}"
    done = run(place, "sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *code(script))
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 2, done.stderr


def test_a_file_of_someone_elses_is_told(place: Path):
    if not allowed("--user", "true"):
        pytest.skip("this machine allows no users of one's own")
    (place / "secret").touch(mode=0)
    script = "from ablation_lab import errors\nwith errors.explained(): open('secret')"
    done = run(place, "unshare", "--user", *code(script))  # without the rights of root
    assert done.returncode == 1
    assert "error: secret: Expected the permission to use it. Found: Permission denied. Change its own" in done.stderr


def test_what_the_user_can_do_nothing_about_keeps_its_traceback(place: Path):
    for line in ("1 / 0", "open('nowhere')", "raise ValueError('errno 28 pictures')"):
        done = run(place, *code(f"from ablation_lab import errors\nwith errors.explained(): {line}"))
        assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_a_mistake_ends_with_its_own_words(place: Path):
    (place / "networks").mkdir()
    (place / "networks/own.py").write_text("def build():\n    raise ValueError('\x1b[1mno mood\x1b[0m')\n")
    script = "from ablation_lab import errors\nsys.path.insert(0, '.')\n"
    script += "with errors.explained(exit_status=2, advice='Try this.'):\n    from networks import own\n    own.build()"
    done = run(place, *code(script))
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "\x1b" not in done.stderr
    assert done.stderr.endswith("\nerror: networks/own.py, line 2, in build: ValueError: no mood\nTry this.\n")


KERAS = (
    "Exception encountered when calling Moody.call().\n\n\x1b[1mI am in no mood.\nTry again.\x1b[0m\n\n"
    "Arguments received by Moody.call():\n  • x=tf.Tensor(shape=(None, 4), dtype=float32)\n  • training=True"
)
TENSORFLOW = (
    "Graph execution error:\n\nDetected at node loss/Xent defined at (most recent call last):\n"
    '  File "fit.py", line 36, in <module>\n\n  File "keras/trainer.py", line 399, in fit\n\n'
    "Received a label value of 7 which is outside the valid range of [0, 3).\n\t [[{{node loss/Xent}}]] [Op:__x_8]"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError(KERAS), "ValueError: I am in no mood.\nTry again."),
        (KeyError(KERAS), "KeyError: I am in no mood.\nTry again."),
        (
            RuntimeError(TENSORFLOW),
            "RuntimeError: Received a label value of 7 which is outside the valid range of [0, 3).",
        ),
        (AssertionError(), "AssertionError"),
        (OSError(2, "No such file"), "FileNotFoundError: [Errno 2] No such file"),
        (ValueError("x" * 900), f"ValueError: {'x' * (errors.LONGEST - 13)}…"),
    ],
)
def test_the_reason_is_what_was_said_first(error: Exception, told: str):
    assert errors.reason(error) == told


def test_a_file_that_was_merely_tried_before_a_mistake_is_not_its_cause():
    mistake = KeyError("a")
    mistake.__context__ = PermissionError(13, "Permission denied", "weights.h5")
    assert errors.explanation(mistake) is None
    mistake.__context__ = OSError(28, "No space left on device", "weights.h5")  # closing it has raised the mistake
    assert "weights.h5: Expected room on the disk" in (errors.explanation(mistake) or "")


WAITS = """
import sys, time
from ablation_lab import errors, files
from pathlib import Path
with errors.explained():
    try:
        with files.whole(Path("out/cell")) as folder:
            (folder / "new").touch()
            print("waits", flush=True)
            time.sleep(60)
    except BaseException:
        if {swallowed}: raise ImportError("initialization failed")  # as extension modules have it
        raise
"""


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_cleanly(place: Path, number: int, status: int, swallowed: bool):
    command = code(WAITS.format(swallowed=swallowed))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Whoever runs the tests in the background has it ignored, and what it starts inherits this.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=place, text=True, **streams) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        assert process.wait(20) == status
        assert process.stderr.read() == ("\ninterrupted: what was finished is kept, the next call goes on from there\n")
    assert list((place / "out").iterdir()) == []


def test_ctrl_c_is_not_for_a_job_in_the_background(place: Path):
    script = "import os, signal\nfrom ablation_lab import errors\n"
    script += "with errors.explained(): os.kill(os.getpid(), signal.SIGINT)\nprint('goes on')"
    done = run(place, "sh", "-c", 'trap "" INT; exec "$@"', "sh", *code(script))
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def _replace(folder: Path) -> None:
    with files.whole(folder) as part:
        (part / "new").touch()


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_is_there_whenever_its_replacement_is_stopped(tmp_path: Path, monkeypatch, renames: int):
    folder = tmp_path / "reports"
    (folder / "figures").mkdir(parents=True)
    rename, called = Path.rename, []

    def stopped(path: Path, target: Path) -> Path:
        called.append(path)
        if len(called) == renames:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        _replace(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["reports", "figures"]


def test_a_folder_whose_replacement_was_killed_half_way_is_put_back(tmp_path: Path):
    folder = tmp_path / "reports"
    for left in ("reports.old/figures", "reports.part"):
        (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), files.whole(folder):
        assert (folder / "figures").exists()
        1 / 0  # noqa: B018
    _replace(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["reports", "new"]
