"""The database of a server of Prefect: where it is, what keeps a server from using it, and who starts one with it."""

import asyncio
import fcntl
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import IO, NamedTuple

from prefect.server.database.configurations import AsyncPostgresConfiguration
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from pusa.errors import PusaError
from pusa.system.locks import holder_of, note_holder, open_lock, try_lock
from pusa.system.text import first_line
from pusa.system.threads import DaemonThreadPool

log = logging.getLogger("pusa.server")
SETTING = "PREFECT_API_DATABASE_CONNECTION_URL"
DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg")
LOOK_SECONDS = 2.0  # for a lock of SQLite
ANSWER_SECONDS = 6.0  # for PostgreSQL, from the look-up of its host's name
LEAST_FREE = 16 << 20  # bytes on the disk of a database of SQLite; a fresh one takes 3 MB
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Database(NamedTuple):
    """A server's database: how a message names it and the way to another one, and its file if it is one of SQLite."""

    description: str
    file: Path | None


def database(without: str) -> Database:
    """Return the server's database.

    Args:
        without: what to do instead, at the end of messages.

    Raises:
        PusaError: its address is invalid, names a driver that Prefect does not have, or leads out of PREFECT_HOME.
    """
    setting, home = SETTING, PREFECT_HOME.value()
    address = PREFECT_API_DATABASE_CONNECTION_URL.value() or ""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError) as error:  # ValueError: the port
        raise PusaError(f"{setting} is not the address of a database; correct or unset it{without}") from error
    if url.drivername not in DRIVERS:
        raise PusaError(
            f"{setting} names {url.drivername!r}; expected postgresql+asyncpg://USER:PASSWORD@HOST:PORT/NAME or "
            f"sqlite+aiosqlite:///FILE: correct or unset it{without}"
        )
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith((":memory:", "file:")):
        shown = url.render_as_string(hide_password=True)
        return Database(f"{shown}; start it, correct or unset {setting}", None)
    file = Path(url.database).absolute()
    if file.is_relative_to(home):
        setting = f"PREFECT_HOME={home}"
    elif f"{home}/" in address:  # Prefect puts the name into the address as it is
        raise PusaError(
            f"PREFECT_HOME={home} has '?' or '%', with which the address of the database leads elsewhere, to {file}; "
            f"name another folder{without}"
        )
    return Database(f"{file} ({setting}); move it away, make room there, or name another place", file)


def find_damage(file: Path | None) -> str:
    """Return what keeps a server from using its database, as far as a look shows; the server finds out much later.

    Args:
        file: the file of SQLite; None: the database of the settings, which is another one.
    """
    if file is None:
        return _problem_of_connection()
    if (free := shutil.disk_usage(file.parent).free) < LEAST_FREE:
        return f"its disk has {free / 1e6:.1f} MB left, and a server needs {LEAST_FREE / 1e6:.0f} MB"
    if not file.exists():
        return ""
    try:
        with closing(sqlite3.connect(file, timeout=LOOK_SECONDS)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        return "" if getattr(error, "sqlite_errorcode", None) in BUSY else first_line(error)
    return ""


def _problem_of_connection() -> str:
    """Return why a database of PostgreSQL cannot be reached with Prefect's settings; "" if it can."""
    address = PREFECT_API_DATABASE_CONNECTION_URL.value() or ""
    if not address.startswith("postgresql"):
        return ""

    async def ask() -> None:
        engine = await AsyncPostgresConfiguration(connection_url=address).engine()
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        await engine.dispose()

    try:
        DaemonThreadPool(1).submit(copy_context().run, asyncio.run, ask()).result(ANSWER_SECONDS)
    except TimeoutError:
        return f"it did not answer within {ANSWER_SECONDS:.0f} s"
    except Exception as error:  # noqa: BLE001  whatever the driver raises
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


@contextmanager
def starting_alone(file: Path | None, without: str) -> Iterator[IO[str] | None]:
    """Hold the lock of a database, and wait for it if another process starts a server with the same one.

    Raises:
        PusaError: the folder of the database cannot be written or locked.
    """
    if file is None:
        yield None
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(file.with_name(f"{file.name}.lock"))
    except OSError as error:
        raise PusaError(
            f"Prefect cannot keep its records in {file.parent} ({error.strerror}); set PREFECT_HOME to a folder "
            f"that can be written{without}"
        ) from error
    with lock:
        kind, other = fcntl.LOCK_EX, f"--no-prefect, or another PREFECT_HOME than {PREFECT_HOME.value()},"
        if not try_lock(lock, kind, wait=False, other=other):
            log.info("waiting for %s, which starts a server with %s", holder_of(lock), file)
            try_lock(lock, kind, wait=True, other=other)
        note_holder(lock)
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # the server has it open as well
