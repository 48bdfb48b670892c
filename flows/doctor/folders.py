"""Checks of a run's folder: who works there, what is torn, what killed writers left, and the room that is left."""

import fcntl
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flows.doctor.findings import Check, Finding, note, ok, problem
from pusa.data.reader import Table
from pusa.errors import PusaError
from pusa.finetune.checkpoint import find_missing
from pusa.generate.ledger import WORK, read_good_record, read_record
from pusa.generate.listed import JOBS, listed_jobs
from pusa.generate.outputs import RECORD, VIDEO
from pusa.system.disk import GIB, free_bytes
from pusa.system.files import LOCK, PARTIAL, read_object, remove_partials
from pusa.system.locks import LOCKS_FOLDER, holder_now, open_lock, try_lock
from pusa.system.text import join_names, printable

TABLES = ("clips", "latents")
LEAST_FREE = GIB  # bytes; a manifest's min_free_gib may ask for more
AGAIN = "run its manifest again: what is torn is made again, and the rest is kept"


def folder_checks(run: Path) -> dict[str, Check]:
    """Return the checks of a run's folder by their names."""
    checks = {"work": check_work, "tables": check_tables, "checkpoints": check_checkpoints, "videos": check_videos,
              "unfinished files": check_partials, "disk": check_disk}  # fmt: skip
    return {f"{name} of {printable(run)}": partial(check, run) for name, check in checks.items()}


def check_work(run: Path) -> Iterator[Finding]:
    """Name who works in a run's folder now."""
    if not run.is_dir():
        yield problem("it is not a folder", "name the folder of a run, for example runs/tiny")
        return
    locks = sorted([*run.glob(LOCK), *run.glob(f"*/{LOCK}"), *run.glob(f"*/{LOCKS_FOLDER}/*.lock")])
    holders = {holder: lock for lock in locks if (holder := holder_now(lock))}
    for holder, lock in holders.items():
        yield note(f"{printable(lock)} is held by {holder}")
    used = {lock.parent for lock in locks if lock.name == LOCK and is_in_use(lock)}
    for folder in sorted(used - {lock.parent for lock in holders.values()}):
        yield note(f"somebody works in {printable(folder)}")
    left = sum(lock.parent.name == LOCKS_FOLDER for lock in locks)
    if not holders and not used:
        free = f"; {left} lock files are left, which nobody holds and the next run removes" if left else ""
        yield ok(f"nobody works there{free}")


def is_in_use(lock: Path) -> bool:
    """Return whether anybody holds the lock of a folder, also as one of several. The file is not created."""
    try:
        with open(os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_tables(run: Path) -> Iterator[Finding]:
    """Compare the tables of a run with their indexes."""
    for name in TABLES:
        folder = run / name
        if not folder.is_dir():
            continue
        try:
            table = Table.open(folder)
            intact = table.is_intact()
        except PusaError as error:
            finding = note if is_in_use(folder / LOCK) else problem
            yield finding(str(error), AGAIN)
            continue
        rows = sum(shard["rows"] for shards in table.parts.values() for shard in shards)
        yield ok(f"{name}: {rows:,} rows") if intact else problem(f"{folder}: a shard is not as it was written", AGAIN)


def check_checkpoints(run: Path) -> Iterator[Finding]:
    """Compare the checkpoints of a run with their records: names and sizes. Loading one compares hashes as well."""
    steps = sorted(path for path in run.glob("checkpoints/[0-9]*") if path.is_dir() and path.name.isdecimal())
    torn = {path: damage for path in steps if (damage := find_missing(path))}
    for path, damage in torn.items():
        yield problem(f"{path}: {printable(damage)}", "training resumes from the last one that is whole")
    if steps and not torn:
        yield ok(f"{len(steps)}, the last at step {int(steps[-1].name):,}")


def check_videos(run: Path) -> Iterator[Finding]:
    """Compare the videos of a run with their records. Nothing is changed: the next run makes again what is torn."""
    folder = run / "videos"
    if not folder.is_dir():
        return
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    records = [name.removesuffix(RECORD) for name in names if name.endswith(RECORD)]
    torn, done, failed = [], 0, 0
    for id in records:
        if not read_record(folder / f"{id}{RECORD}"):
            torn.append(f"{id}{RECORD}")
        elif read_object(folder / f"{id}{RECORD}").get("status") != "done":
            failed += 1
        elif not read_good_record(folder, id):
            torn.append(f"{id}{VIDEO}")
        else:
            done += 1
    alone = [name for name in names if name.endswith(VIDEO) and name.removesuffix(VIDEO) not in records]
    if torn:
        yield problem(f"{len(torn)} files are not as they were written: {join_names(torn)}", AGAIN)
    if alone:
        mend = "run the manifest again, which makes them again, or move them away if they are of somebody else"
        yield note(f"{len(alone)} videos have no record: {join_names(alone)}", mend)
    if (folder / WORK).is_dir():
        try:
            listed_jobs(folder)
        except PusaError as error:
            yield problem(str(error), "run the manifest again")
    elif names:
        yield note(f"{folder / WORK / JOBS} does not exist, so pusa status knows no jobs", "run the manifest again")
    if not torn:
        yield ok(f"{done:,} made, {failed:,} failed")


def check_partials(run: Path) -> Iterator[Finding]:
    """Look for the unfinished files of killed writers; those of writers that live are theirs."""
    folders = [folder for folder in [run, *run.glob("*")] if folder.is_dir() and not folder.is_symlink()]
    found = {folder: len(list(folder.glob(f"{PARTIAL}*"))) for folder in folders}
    for folder, count in found.items():
        if count and not is_in_use(folder / LOCK):
            repair = partial(_remove_partials, folder) if (folder / LOCK).is_file() else None
            text = f"{count} unfinished files of killed writers are in {printable(folder)}"
            yield note(text, "the next run removes them, or pusa doctor --repair", repair)


def _remove_partials(folder: Path) -> str:
    with open_lock(folder / LOCK) as lock:
        if not try_lock(lock, fcntl.LOCK_EX, wait=False):
            return "nothing, since somebody works there now"
        remove_partials(folder)
    return "they were removed"


def check_disk(run: Path) -> Iterator[Finding]:
    """Measure the room that is left where a run writes."""
    free = free_bytes(run)
    text = f"{free / GIB:.1f} GiB free"
    yield ok(text) if free >= LEAST_FREE else problem(text, "make room; runs pause below min_free_gib")
