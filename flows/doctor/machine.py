"""Checks of this machine: packages, GPUs, memory, ffmpeg, caches, Prefect's folder, and servers that nobody owns."""

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.doctor.findings import Check, Finding, note, ok, problem
from pusa.system.disk import GIB, free_bytes
from pusa.system.locks import holder_now
from pusa.system.processes import identity, is_running
from pusa.system.text import printable

SHOWN = ("prefect", "sqlalchemy", "torch", "diffusers", "transformers")
# Packages that install together and fail together: what the first one must not be while the second one is that.
CLASHES = (("prefect", "<3.9.1", "sqlalchemy", ">=2.1", "no schedule fires"),)
ENCODERS = ("libx264", "libx265", "ffv1")  # of ffmpeg; videos are written with the first
LEAST_MEMORY, LEAST_FREE = 4 * GIB, 10 * GIB  # bytes
SECONDS = 20.0  # for a program that is asked
END_SECONDS = 10.0  # for a server to end, between SIGTERM and SIGKILL
OWN_APP, PREFECTS_APP = "flows.own_origin:create_app", "prefect.server.api.server:create_app"


def machine_checks() -> dict[str, Check]:
    """Return the checks by their names."""
    return {
        "python": check_python,
        "packages": check_packages,
        "gpus": check_gpus,
        "gpu locks": check_gpu_locks,
        "memory": check_memory,
        "ffmpeg": check_ffmpeg,
        "time zone": check_time_zone,
        "caches": check_caches,
        "prefect home": check_home,
        "servers": check_servers,
    }


def check_python() -> Iterator[Finding]:
    """Compare Python's version with the one that Pusa requires."""
    required, running = metadata("pusa")["Requires-Python"] or "", platform.python_version()
    if SpecifierSet(required).contains(running):
        yield ok(f"{running}, {platform.system()} {platform.machine()}")
    else:
        yield problem(f"this is Python {running}; pusa requires {required}", "make a new environment with that Python")


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_packages(version_of: Callable[[str], str] = _version_of) -> Iterator[Finding]:
    """Compare the installed packages with what Pusa requires, and look for versions that fail together.

    Args:
        version_of: returns the version of a package; "" if it is not installed.
    """
    needed = [Requirement(line) for line in requires("pusa") or ()]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = [text for each in needed if (text := _unmet(each, version_of(each.name)))]
    for first, of_first, second, of_second, effect in CLASHES:
        installed = version_of(first), version_of(second)
        if all(installed) and installed[0] in SpecifierSet(of_first) and installed[1] in SpecifierSet(of_second):
            wrong.append(f"{first} {installed[0]} fails with {second} {installed[1]}: {effect}")
    for text in wrong:
        yield problem(text, "install pusa again: pip install --upgrade pusa")
    if not wrong:
        yield ok(f"{len(needed)} as required, " + ", ".join(f"{name} {version_of(name)}" for name in SHOWN))


def _unmet(needed: Requirement, installed: str) -> str:
    if not installed:
        return f"{needed.name} is not installed; pusa requires {needed}"
    if not needed.specifier.contains(installed, prereleases=True):
        return f"{needed.name} {installed} is installed; pusa requires {needed.specifier}"
    return ""


def check_gpus() -> Iterator[Finding]:
    """Name the GPUs and their driver. CUDA is not started."""
    import torch

    from pusa.system.devices import VISIBLE, visible_gpus

    count, built = len(visible_gpus()), torch.version.cuda
    query = ("--query-gpu=index,name,memory.total,memory.used,driver_version", "--format=csv,noheader")
    rows = _output(["nvidia-smi", *query]).splitlines() if shutil.which("nvidia-smi") else []
    for row in rows:
        yield ok(printable(f"GPU {row}"))
    if count:
        yield ok(f"{count} can be used, with CUDA {built}")
    elif rows:
        limits = f"{VISIBLE}={os.environ[VISIBLE]!r}" if VISIBLE in os.environ else f"torch's CUDA {built}"
        yield problem(f"none of {len(rows)} can be used ({limits})", f"unset {VISIBLE}, or install a newer driver")
    else:
        yield note("there is none: models run on the CPU")


def check_gpu_locks() -> Iterator[Finding]:
    """Name who holds GPUs of this machine now."""
    from pusa.system.devices import locks_folder

    held = {path.stem: holder for path in sorted(locks_folder().glob("*.lock")) if (holder := holder_now(path))}
    for uuid, holder in held.items():
        yield note(f"{uuid} is used by {holder}")
    if not held:
        yield ok("nobody holds one")


def check_memory() -> Iterator[Finding]:
    """Compare the memory that is available with what a small model takes."""
    pairs = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(size.split()[0]) * 1024 for name, size in pairs}
    text = f"{sizes['MemAvailable'] / GIB:.1f} GiB of {sizes['MemTotal'] / GIB:.1f} GiB available"
    enough = sizes["MemAvailable"] >= LEAST_MEMORY
    yield ok(text) if enough else note(text, "end other programs, or expect runs to be killed")


def check_ffmpeg() -> Iterator[Finding]:
    """Look for ffmpeg and the encoders that it needs."""
    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    first = _output([program, "-hide_banner", "-version"]).split("\n")[0]
    listed = {words[1] for line in _output([program, "-hide_banner", "-encoders"]).splitlines()
              if len(words := line.split()) > 1}  # fmt: skip
    if ENCODERS[0] not in listed:
        yield problem(f"{program} lacks the encoder {ENCODERS[0]}", "unset IMAGEIO_FFMPEG_EXE, or name a whole ffmpeg")
    else:
        yield ok(f"{' '.join(first.split()[:3])} with {', '.join(name for name in ENCODERS if name in listed)}")


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True)  # noqa: S603
    return done.stdout


def check_time_zone() -> Iterator[Finding]:
    """Name the time zone of schedules."""
    from flows.deployments import local_timezone

    if name := local_timezone():
        yield ok(name)
    else:
        text = "this machine does not name its time zone, so schedules count in UTC"
        yield note(text, "set TZ, for example to Europe/Berlin")


def check_caches() -> Iterator[Finding]:
    """Measure the folders that grow: encodings and downloaded models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from pusa.generate.encodings import encodings_folder

    for name, folder in (("encodings", encodings_folder()), ("models of the Hub", Path(HF_HUB_CACHE))):
        if folder is None:
            yield note(f"{name} are not kept")
            continue
        free = free_bytes(folder)
        text = f"{name}: {_size_of(folder) / GIB:.2f} GiB in {folder}, {free / GIB:.1f} GiB free"
        yield (
            ok(text) if free >= LEAST_FREE else note(text, "remove unused models, or move the folder to another disk")
        )


def _size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; links count as nothing."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found = os.lstat(os.path.join(inner, name))
                total += found.st_blocks * 512
    return total


def check_home() -> Iterator[Finding]:
    """Look at the folder where Prefect keeps its records: who starts a server there, and its size."""
    from prefect.settings import PREFECT_HOME

    home = PREFECT_HOME.value()
    if home.is_dir() and not os.access(home, os.W_OK):
        yield problem(f"{home} cannot be written", "set PREFECT_HOME to a folder that can")
        return
    for lock in sorted(home.glob("*.lock")):
        if holder := holder_now(lock):
            yield note(f"{lock} is held by {holder}, which starts a server")
    database = home / "prefect.db"
    size = database.stat().st_size / 1e6 if database.is_file() else 0
    yield ok(f"{home}, with {size:,.0f} MB of records, {free_bytes(home) / GIB:.1f} GiB free")


@dataclass(frozen=True)
class ServerProcess:
    """A server of Prefect that runs on this machine: its number, its identity, and its parent's number and command."""

    pid: int
    identity: str
    command: str
    parent: int
    parents_command: str
    temporary: bool

    @property
    def is_orphaned(self) -> bool:
        """Return whether the process that started it is gone, though it should have ended with that."""
        starter = any(word in self.parents_command for word in ("pusa", "flows", "prefect", "pytest"))
        bound = OWN_APP in self.command or self.temporary
        return bound and not starter and (self.parent == 1 or "systemd" in self.parents_command)


def check_servers(processes: Path = Path("/proc")) -> Iterator[Finding]:
    """Look for servers of this user whose starter is gone."""
    found = list(find_servers(processes))
    for server in found:
        if server.is_orphaned:
            text = (
                f"process {server.pid} is a server of Prefect whose starter is gone: {printable(server.command, 120)}"
            )
            yield problem(text, f"end it: kill {server.pid}, or pusa doctor --repair", partial(end_process, server))
        else:
            yield ok(f"process {server.pid} serves Prefect, started by process {server.parent}")
    if not found:
        yield ok("no server of Prefect runs here")


def find_servers(processes: Path) -> Iterator[ServerProcess]:
    """Yield the servers of Prefect that run as this user."""
    for folder in processes.iterdir():
        try:
            if not folder.name.isdecimal() or folder.stat().st_uid != os.getuid():
                continue
            command = _command_in(folder)
            if "uvicorn" not in command or not (OWN_APP in command or PREFECTS_APP in command):
                continue
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            temporary = b"PREFECT__SERVER_EPHEMERAL=1" in (folder / "environ").read_bytes().split(b"\0")
            name = identity(int(folder.name))
        except OSError:  # it has ended
            continue
        try:
            parents = _command_in(processes / str(parent))
        except OSError:
            parents = ""
        yield ServerProcess(int(folder.name), name, command, parent, parents, temporary)


def _command_in(folder: Path) -> str:
    return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def end_process(server: ServerProcess) -> str:
    """End a server, if its process is still the one that was found."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if is_running(server.identity):
            os.kill(server.pid, number)
        end = time.monotonic() + END_SECONDS
        while is_running(server.identity) and time.monotonic() < end:
            time.sleep(0.1)
        if not is_running(server.identity):
            return f"process {server.pid} was ended"
    raise TimeoutError(f"process {server.pid} still runs {END_SECONDS:.0f} s after SIGKILL; it may wait for a disk")
