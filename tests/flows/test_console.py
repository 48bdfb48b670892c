"""Standard streams: closed, full or unread, they end no run; what is written to them steers no terminal."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flows.commands import main
from flows.console import LONGEST_ENTRY, STEERING, log_to_console, print_error, print_result, show
from pusa.errors import ManifestError
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


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b2J\u202eabc\u2028\r\ud800"
LEAVING = f"""
import logging, sys, warnings
from flows.console import log_to_console, open_streams, show
open_streams()
log_to_console()
hostile = {HOSTILE!r}
show(hostile)
show(hostile, error=True)
print(hostile)
logging.getLogger("pusa.x").warning("a %s", hostile)
logging.getLogger("library").error(hostile)
warnings.warn(hostile)
try:
    raise ValueError(hostile)
except ValueError:
    logging.getLogger("pusa.x").exception("failed")
print("\\x1b[31mred\\x1b[0m\\rbar", end="")
raise ValueError(hostile)
"""


def is_safe(text: str) -> bool:
    return all(part.isprintable() for part in text.replace("\t", "\n").split("\n"))


def test_whatever_writes_to_the_streams_steers_no_terminal():
    done = subprocess.run([*python(LEAVING)], capture_output=True)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert out.endswith("\x1b[31mred\x1b[0m\rbar") and out.count("\\x1b]0;title") == 2
    assert err.count("\\x1b]0;title") >= 6 and "Traceback" in err
    assert is_safe(STEERING.sub("", out)) and is_safe(STEERING.sub("", err))


@pytest.fixture
def as_at_the_start():
    """The logging of before a test."""
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


def test_log_lines_are_escaped_and_cut_wherever_they_go(as_at_the_start, caplog):
    log_to_console(logging.WARNING)
    log = logging.getLogger("pusa.x")
    log.warning("a %s\nb", HOSTILE)
    log.warning("%s", "x" * 1_000_000)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    assert is_safe(caplog.text) and len(caplog.text) < 2 * LONGEST_ENTRY
    assert caplog.messages[0].startswith("a \\x1b[2J") and caplog.messages[0].endswith("\nb")
    assert "ValueError: \\x1b[2J" in caplog.text


def test_what_pusa_raises_on_purpose_and_what_was_not_raised_have_no_traceback(as_at_the_start, caplog):
    log_to_console(logging.WARNING)
    log = logging.getLogger("prefect.flow_runs")
    try:
        raise ManifestError("jobs: are missing")
    except ManifestError as error:
        log.exception("Encountered exception during execution: %r", error)
    log.error("Task run failed", exc_info=True)
    lines = [logging.Formatter().format(record) for record in caplog.records]
    assert lines == [
        "Encountered exception during execution: ManifestError('jobs: are missing')",
        "Task run failed",
    ]


def test_an_error_is_short_however_long_its_message_is(capsys):
    print_error("m.yaml:\n" + "  a line\n" * 30_000 + "\x1b[2J")
    print_error("x" * 1_000_000)
    error = capsys.readouterr().err
    assert "  and 29,902 more lines\n" in error and len(error) < 10_000 and is_safe(error)


def test_lines_are_shown_with_their_line_breaks(capsys):
    show("a\n\tb", 1)
    show("c", error=True)
    assert capsys.readouterr() == ("a\n\tb\n1\n", "c\n")


def test_a_long_list_of_a_result_is_counted(capsys):
    print_result(SimpleNamespace(made=["a", "b"], kept=[str(number) for number in range(1000)], failed=[]))
    made, kept = capsys.readouterr().out.splitlines()
    assert made == "  made: a, b" and kept.startswith("  kept: 1,000, the first are 0, 1, 2, ") and len(kept) < 120


def test_check_shows_the_names_of_strangers_as_text(tmp_path, capsys):
    (tmp_path / "a\x1b[2J\u202e").mkdir()
    manifest = tmp_path / "a\x1b[2J\u202e/m.yaml"
    manifest.write_text('kind: ingest\nsource: "clips\\e[2J"\n')
    main(["check", str(manifest), "--run-dir", str(tmp_path / "run")])
    manifest.write_text('kind: ingest\n"\\e[2J": 1\n')
    main(["check", str(manifest)])
    out, error = capsys.readouterr()
    assert "\\x1b[2J" in out and "\\x1b[2J" in error and is_safe(out) and is_safe(error)
