"""Load a server of Prefect as Pusa does: with SQLite and with PostgreSQL, beside each other in one run.

`submit`: a manifest of 10,000 jobs, sent by `pusa submit`. `night`: flow runs whose steps and events are those of a run
of one job, several at a time, while a reader asks as the dashboard does. `clean`: what is left of them after the
server's own clean-up, when they are old enough. The database is on PostgreSQL if its programs are installed.

    .venv/bin/python -m tests.benchmarks.server_load submit|night|clean [--runs 200] [--threads 2] [--jobs 10000]
"""

import argparse
import asyncio
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tests.benchmarks.many_jobs import HEAD, PROMPT
from tests.helpers.postgres import PostgreSQL, program
from tests.helpers.processes import wait_for

STEPS, EVENTS = 3, 4  # of a run of one job: the step, its chunk, the pages; and what is announced
OLD = "400 days"


class Server:
    """`pusa server` in a folder of its own."""

    def __init__(self, folder: Path, database: PostgreSQL | None, **settings: str) -> None:
        self.log = folder / f"server-{time.time_ns()}.log"
        self.environment = {**os.environ, "PREFECT_HOME": str(folder / "home"), **settings}
        self.environment.pop("PREFECT_API_URL", None)
        if database:
            self.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database.url
        with self.log.open("w") as output:
            command = [sys.executable, "-m", "flows", "server", "--port", "0"]
            self.process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        began = time.monotonic()
        wait_for(lambda: self.process.poll() is not None or "PREFECT_API_URL=" in self.log.read_text(), 600)
        self.start_seconds = time.monotonic() - began
        found = re.search(r"PREFECT_API_URL=(\S+)", self.log.read_text())
        assert found, self.log.read_text()
        self.url = found[1]
        self.environment["PREFECT_API_URL"] = self.url

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait()

    def call(self, *words: str) -> float:
        """Run a command of Pusa, and return its seconds on a core: the clock's count other programs too."""
        before = _children()
        subprocess.run(
            [sys.executable, "-m", "flows", *words], env=self.environment, stdout=subprocess.DEVNULL, check=True
        )
        return _children() - before


class Database:
    """What the two databases are asked: rows, bytes, and to make everything old."""

    def __init__(self, folder: Path, postgres: PostgreSQL | None) -> None:
        self.file = folder / "home/prefect.db"
        self.url = postgres.url if postgres else f"sqlite+aiosqlite:///{self.file}"

    def _each(self, *statements: str) -> list[Any]:
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import create_async_engine

        async def ask() -> list[Any]:
            engine, answers = create_async_engine(self.url, isolation_level="AUTOCOMMIT"), []
            async with engine.connect() as connection:
                for statement in statements:
                    result = await connection.execute(text(statement))
                    answers.append(result.scalar() if result.returns_rows else None)
            await engine.dispose()
            return answers

        return asyncio.run(ask())

    @property
    def size(self) -> int:
        """Bytes on the disk, those of SQLite's log included."""
        if "sqlite" not in self.url:
            return self._each("SELECT pg_database_size('prefect')")[0]
        return sum(path.stat().st_size for path in self.file.parent.glob("prefect.db*") if path.suffix != ".lock")

    def rows(self) -> dict[str, int]:
        """Rows of the tables that grow."""
        tables = ("flow_run", "task_run", "flow_run_state", "task_run_state", "log", "artifact", "events")
        return dict(zip(tables, self._each(*(f"SELECT count(*) FROM {table}" for table in tables)), strict=True))

    def age(self) -> None:
        """Make every run, log and event old enough for the clean-up."""
        past = f"datetime('now', '-{OLD}')" if "sqlite" in self.url else f"now() - interval '{OLD}'"
        self._each(
            f"UPDATE flow_run SET end_time = {past}",
            f"UPDATE log SET timestamp = {past}",
            f"UPDATE events SET occurred = {past}",
        )

    def pack(self) -> None:
        """Give the space of what was deleted back."""
        self._each("VACUUM" if "sqlite" in self.url else "VACUUM FULL")


@contextmanager
def connected(server: Server) -> Iterator[Any]:
    """Yield a client of a server; flows of this process report to it."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        yield client


def submit(server: Server, database: Database, folder: Path, options: argparse.Namespace) -> None:
    """Send a long manifest, and then one of a single job."""
    server.call("deploy")
    for jobs in (1, options.jobs):
        path = folder / f"{jobs}.yaml"
        rows = (f'  - {{id: j{i}, task: text_to_video, prompt: "{PROMPT}", seed: {i}}}\n' for i in range(jobs))
        path.write_text(HEAD + "".join(rows))
        before = database.size
        seconds = server.call("submit", str(path), "--run-dir", str(folder / str(jobs)))
        with connected(server) as client:
            run = next(run for run in client.read_flow_runs() if f"{jobs:,} job" in run.name)
        print(
            f"  {jobs:>6} jobs, {path.stat().st_size / 1e6:.1f} MB of YAML: submitted in {seconds:.1f} s of a core, parameters "
            f"{len(str(run.parameters))} bytes, database +{(database.size - before) / 1024:.0f} KiB"
        )


def night(server: Server, database: Database, folder: Path, options: argparse.Namespace) -> None:
    """Do many small runs at once."""
    from prefect import flow, task
    from prefect.artifacts import create_markdown_artifact
    from prefect.events import emit_event
    from prefect.logging import get_run_logger

    @task
    def step(number: int) -> None:
        get_run_logger().info("step %s of a run, with a line as long as those of Pusa's log often are", number)

    @flow
    def one_job() -> None:
        for number in range(STEPS):
            step(number)
        for number in range(EVENTS):
            emit_event(f"pusa.job.made.{number}", resource={"prefect.resource.id": "pusa.run./srv/pusa/runs/night"})
        create_markdown_artifact("| job | state |\n|---|---|\n" + "| ball | done |\n" * 20, key="night")

    asked: list[float] = []
    with connected(server) as client:
        one_job()  # what is made at the first run only
        before, rows = database.size, database.rows()
        done = Event()
        reader = Thread(target=copy_context().run, args=(_ask, client, asked, done))
        reader.start()
        began, seconds = time.monotonic(), []
        with ThreadPoolExecutor(options.threads) as pool:
            for one in [pool.submit(copy_context().run, _timed, one_job) for _ in range(options.runs)]:
                seconds.append(one.result())
        total = time.monotonic() - began
        done.set()
        reader.join()
        wait_for(lambda: database.rows()["task_run"] - rows["task_run"] >= STEPS * options.runs)
    growth = {table: count - rows[table] for table, count in database.rows().items()}
    locked = server.log.read_text().count("database is locked")
    print(
        f"  {options.runs} runs, {options.threads} at once: {total:.0f} s; a run {sorted(seconds)[len(seconds) // 2]:.2f}"
        f" s, the longest {max(seconds):.1f} s; a page of runs {sorted(asked)[len(asked) // 2] * 1000:.0f} ms, the "
        f"longest {max(asked):.1f} s; {locked} x 'database is locked'; database +"
        f"{(database.size - before) / options.runs / 1024:.1f} KiB a run, of {growth}"
    )


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _timed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _ask(client: Any, asked: list[float], done: Event) -> None:
    while not done.wait(0.5):
        asked.append(_timed(lambda: client.read_flow_runs(limit=50)))


def clean(server: Server, database: Database, folder: Path, options: argparse.Namespace) -> None:
    """Make many runs, age them, and look at what Prefect's clean-up leaves."""
    night(server, database, folder, options)
    full, rows = database.size, database.rows()
    server.__exit__()
    database.age()
    settings = {"PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "5", **dict(options.setting)}
    postgres = None if "sqlite" in database.url else options.postgres
    with Server(folder, postgres, **settings):
        began = time.monotonic()
        wait_for(lambda: database.rows()["events"] < rows["events"] / 2)
        if "flow_runs" in settings.get("PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED", ""):
            wait_for(lambda: database.rows()["flow_run"] == 0)
        seconds = time.monotonic() - began
        wait_for(lambda: seconds + began + 10 < time.monotonic())  # what belongs to them goes after them
    left = database.size
    print(
        f"  cleaned after {seconds:.0f} s: {rows} -> {database.rows()}; {full / 1e6:.1f} -> {left / 1e6:.1f} MB", end=""
    )
    database.pack()
    print(f", packed {database.size / 1e6:.1f} MB")


PARTS = {"submit": submit, "night": night, "clean": clean}


def main() -> None:
    """Run a part with each database."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--setting", type=lambda text: tuple(text.split("=", 1)), action="append", default=[])
    options = parser.parse_args()
    if not options.only:  # a process for each: the threads that send events know one server
        for name in ("sqlite", *(["postgres"] if program("initdb") else [])):
            command = [sys.executable, "-m", "tests.benchmarks.server_load", *sys.argv[1:], "--only", name]
            subprocess.run(command, check=True)
        return
    with (
        tempfile.TemporaryDirectory() as place,
        PostgreSQL() if options.only == "postgres" else nullcontext() as postgres,
    ):
        folder, options.postgres = Path(place), postgres
        with Server(folder, postgres) as server:
            print(f"{options.only}: the server starts in {server.start_seconds:.0f} s", flush=True)
            PARTS[options.part](server, Database(folder, postgres), folder, options)


if __name__ == "__main__":
    main()
