"""Commands run with a folder on a disk that is full or read-only: really, in mount namespaces that end with them."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run

# A small disk with what the folder holds; what the command leaves on it is copied off again.
SMALL = """
set -e
folder=$1 left=$2 kept=$(mktemp -d)
cp -a "$folder/." "$kept"
mount -t tmpfs -o size="$3" tmpfs "$folder"
cp -a "$kept/." "$folder"
rm -r "$kept"
shift 3
status=0
"$@" || status=$?
cp -a "$folder" "$left"
exit $status
"""
READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
shift
exec "$@"
"""


def on_small_disk(
    folder: Path, kilobytes: int, cwd: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command while `folder` is a disk of so many kilobytes; afterwards it holds what the command left there."""
    _need_namespaces()
    left = folder.with_name(f"{folder.name}.left")
    arguments = (str(folder), str(left), f"{kilobytes}k", *command)
    done = run(cwd, "unshare", "-rm", "sh", "-c", SMALL, "sh", *arguments, **environment)
    assert left.is_dir(), done.stderr
    shutil.rmtree(folder)
    left.rename(folder)
    return done


def on_read_only_disk(folder: Path, cwd: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command while nobody, root included, can write to `folder`."""
    _need_namespaces()
    return run(cwd, "unshare", "-rm", "sh", "-c", READ_ONLY, "sh", str(folder), *command, **environment)


@functools.cache
def _namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ("unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _need_namespaces() -> None:
    if not _namespaces():
        pytest.skip("this machine lets no user make a mount namespace")
