"""A full disk, a small one or a read-only folder for one command: mounted in a namespace that ends with it."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def allowed(*command: str) -> bool:
    """Whether `unshare` may be called with these arguments."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", *command], capture_output=True, check=False).returncode == 0


def _mounted(script: str, *values: str) -> tuple[str, ...]:
    if not allowed("--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"):
        pytest.skip("this machine allows no mounts of one's own")
    return ("unshare", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *values)


def read_only(folder: Path, *command: str) -> tuple[str, ...]:
    """The command that runs another one to which a folder is read-only; for root too, whom permissions don't stop."""
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; cd "$PWD"; exec "$@"'
    return _mounted(script, str(folder), *command)


def full_disk(folder: Path, room: int, *command: str) -> tuple[str, ...]:
    """The command that runs another one to which a folder lies on a disk of its own.

    What is there afterwards is copied back, as far as the command has changed it.

    Args:
        room: kB that are free on the disk.
    """
    script = """
    folder=$1 room=$2; shift 2
    kept=$(mktemp -d)
    mount --bind "$folder" "$kept"
    size=$(du -sk --apparent-size "$folder" | cut -f1)
    mount -t tmpfs -o size=$((2 * size + 4096 + room))k tmpfs "$folder"
    cp -a "$kept/." "$folder"
    cd "$PWD"
    head -c $((1024 * ($(df --output=avail -k "$folder" | tail -1) - room))) /dev/zero > "$folder/.fill"
    status=0; "$@" || status=$?
    rm "$folder/.fill"
    find "$kept" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
    cp -a "$folder/." "$kept"
    umount "$kept"; rmdir "$kept"
    exit $status
    """
    return _mounted(script, str(folder), str(room), *command)


def small_disk(folder: Path, size: int, *command: str) -> tuple[str, ...]:
    """The command that runs another one to which a folder lies on a small disk of its own, with what it holds.

    What is on the disk afterwards is in `<folder>.left`.

    Args:
        size: kB of the disk.
    """
    script = """
    folder=$1 size=$2; shift 2
    kept=$(mktemp -d)
    cp -a "$folder/." "$kept"
    mount -t tmpfs -o size="$size"k tmpfs "$folder"
    cp -a "$kept/." "$folder"
    rm -r "$kept"
    status=0; "$@" || status=$?
    cp -a "$folder" "$folder.left"
    exit $status
    """
    return _mounted(script, str(folder), str(size), *command)


def hidden(folder: Path, *command: str) -> tuple[str, ...]:
    """The command that runs another one to which a folder is empty."""
    return _mounted('mount -t tmpfs tmpfs "$1"; shift; exec "$@"', str(folder), *command)
