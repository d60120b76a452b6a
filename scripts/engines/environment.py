"""Scratch environments of serving engines: pinned packages, checked by their hashes, kept between runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
# The lists of hashes are those of one Python's wheels.
PYTHON = (3, 11)


class Unavailable(Exception):
    """An engine does not install or run on this machine."""


def say(text: str) -> None:
    print(f"engine-check: {text}", file=sys.stderr, flush=True)


class Environment:
    """A folder with an interpreter of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin/python"

    @property
    def packages(self) -> Path:
        """Where its packages lie."""
        return self.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def is_complete(self, name: str) -> bool:
        """Whether everything in a list of requirements is there."""
        complete = self.folder / "complete"
        return complete.is_file() and complete.read_text() == digest(name)

    def install(self, name: str, beside: list[Path] = ()) -> None:
        """Installs a list of requirements, with the packages of other environments in reach."""
        if self.is_complete(name):
            return
        say(f"installing {name} into {self.folder}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.run([sys.executable, "-m", "venv", self.folder])
        if beside:
            (self.packages / "beside.pth").write_text("".join(f"{path}\n" for path in beside))
        pip = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # Everything is on the list: what a package says that it needs is not asked for, since some name builds that
        # only other indexes have.
        self.run([*pip, "install", "--no-compile", "--no-deps", *self.listed(name)])
        (self.folder / "complete").write_text(digest(name))

    def unpack(self, name: str, folder: Path) -> Path:
        """Unpacks the archives of a list of requirements without building or installing anything."""
        complete = folder / "complete"
        if complete.is_file() and complete.read_text() == digest(name):
            return folder
        say(f"downloading {name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        archives = folder / "archives"
        archives.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        self.run([*pip, "download", "--no-deps", "--dest", archives, *self.listed(name)])
        for archive in sorted(archives.iterdir()):
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(folder)
            else:
                with tarfile.open(archive) as opened:
                    opened.extractall(folder, filter="data")
        shutil.rmtree(archives)
        complete.write_text(digest(name))
        return folder

    def listed(self, name: str) -> list:
        """Options of pip for a list of requirements."""
        path = REQUIREMENTS / name
        if sys.version_info[:2] == PYTHON:
            return ["--require-hashes", "-r", path]
        say(f"this is Python {sys.version.split()[0]}: hashes of {name} are NOT checked, they are those of 3.11")
        names = [line.split()[0] for line in path.read_text().splitlines() if line and not line.startswith(("#", " "))]
        return names

    @staticmethod
    def run(command: list) -> None:
        try:
            subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"does not install here: {error}") from error


def digest(name: str) -> str:
    """What a complete environment was made from."""
    lines = [line for line in (REQUIREMENTS / name).read_text().splitlines() if not line.startswith("#")]
    return hashlib.sha256("\n".join([*lines, str(sys.version_info[:2])]).encode()).hexdigest()


def worker(command: list, log: Path, seconds: float, **variables: str) -> None:
    """Runs a program of an environment to its end. Its last words are in the error where it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, **variables}
    # Without compiled files each of an engine's processes takes a minute to import what it needs.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            raise RuntimeError(f"took longer than {seconds:.0f} s\n{last_words(log)}") from None
        except BaseException:
            stop(process)
            raise
    if code:
        raise RuntimeError(f"ended with exit code {code}\n{last_words(log)}")


def stop(process: subprocess.Popen) -> None:
    """Ends a program and those that it started, which share its session."""
    for signal in (15, 9):
        try:
            os.killpg(process.pid, signal)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def last_words(log: Path, lines: int = 12) -> str:
    text = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in text[-lines:])


def post(url: str, value: dict, seconds: float) -> dict:
    """Asks a server on this machine."""
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds) as answer:
        return json.load(answer)


def wait_until(is_ready, process: subprocess.Popen, seconds: float) -> bool:
    """Whether something came true before a process ended or time was up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if is_ready():
            return True
        time.sleep(0.2)
    return False
