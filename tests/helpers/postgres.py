"""A PostgreSQL server for a trial, from the programs of Debian's package."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self


def program(name: str) -> str:
    """Return a program of PostgreSQL, which Debian puts beside the path, or ""."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
    return shutil.which(name, path=path) or ""


class PostgreSQL:
    """A database server in a folder of its own, on a port of its own. It does not run as root."""

    def __init__(self) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="pusa-postgres-"))  # pytest's are closed to other users
        self.password = "another-password"
        self.user = None
        if os.getuid() == 0:
            self.user = pwd.getpwnam("nobody").pw_name
            shutil.chown(folder, self.user)
        (folder / "password").write_text(self.password)
        (folder / "password").chmod(0o644)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        files = ["-U", "pusa", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "-E", "UTF8", "--no-sync"]
        self.call("initdb", "-D", str(folder / "data"), *files)
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        self.call("pg_ctl", "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
        self.call("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "pusa", "prefect")

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://pusa:{self.password}@127.0.0.1:{self.port}/prefect"

    def call(self, name: str, *words: str) -> None:
        environment = {**os.environ, "PGPASSWORD": self.password}
        # Not captured: the server would keep a pipe open.
        subprocess.run(
            [program(name), *words], user=self.user, env=environment, cwd="/", stdout=subprocess.DEVNULL, check=True
        )

    def control(self, action: str) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "fast", "-l", str(self.folder / "log"), "-w", action)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.control("stop")
        shutil.rmtree(self.folder)
