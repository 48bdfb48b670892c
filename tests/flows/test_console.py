"""Standard streams that are closed, full, unread, or lack a character: no reason for a run to fail."""

import os
import subprocess
import sys

import pytest

from tests.helpers.processes import python

CLOSED = """
import os, subprocess, sys
from flows.console import flush_streams, open_streams
open_streams()
with open(sys.argv[1], "wb") as file:
    print("a result")
    print("a log line", file=sys.stderr)
    sys.stdin.read()
    code = subprocess.run([sys.executable, "-c", "import os; [os.fstat(n) for n in (0, 1, 2)]"]).returncode
    file.write(f"{file.fileno() > 2} {code} {flush_streams()!r}".encode())
"""
COMMAND = "import sys; from flows.commands import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed, tmp_path):
    command = f'exec "$0" -c "$1" "$2" </dev/null >/dev/null 2>/dev/null {closed}'
    code = subprocess.run(["sh", "-c", command, sys.executable, CLOSED, str(tmp_path / "file")]).returncode
    assert (code, (tmp_path / "file").read_text()) == (0, "True 0 ''")


def run(*words: str, **streams):
    return subprocess.run([*python(COMMAND), *words], text=True, stdin=subprocess.DEVNULL, **streams)


def test_a_full_disk_under_stdout_is_a_sentence():
    with open("/dev/full", "w") as full:
        done = run("list", "tasks", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith("pusa: the output is incomplete") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    done = run("list", "tasks", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_can_read_keeps_its_exit_code():
    with open("/dev/full", "w") as full:
        assert run("describe", "nothing", stdout=full, stderr=full).returncode == 1
        assert run("nothing", stdout=full, stderr=full).returncode == 2


def test_a_character_that_the_encoding_lacks_is_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("check", "é日.yaml", capture_output=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith(r"pusa: \xe9\u65e5.yaml")
