"""The table on the terminal: what it shows fits, is safe, leaves other output undamaged, and is gone in the end."""

import codecs
import io
import os
import pty
import re
import select
import signal
import sys
import termios
from collections.abc import Callable
from contextlib import contextmanager
from threading import Event, Thread

import pytest
from rich.cells import cell_len

from flows import terminal
from flows.console import Footer, _Terminal, footer, show
from flows.terminal import Table, shown_on_terminal
from pusa.generate.stage import generate
from pusa.system.progress import Progress, listening, report_busy, report_counts, report_end, report_steps
from tests.flows.test_console import HOSTILE
from tests.helpers.processes import wait_for
from tests.helpers.stub_model import StubModel, manifest_of

COLOURS = re.compile(r"\x1b\[[\d;]*m")
SIZES = [(columns, lines) for columns in (1, 20, 40, 80, 200) for lines in (1, 2, 8, 24, 60)]


class Screen:
    """A terminal's screen, as far as what is written uses it: it has no width, and scrolls without end."""

    def __init__(self, master: int, attach: Callable[[], None]) -> None:
        self.attach = attach  # makes it stderr; pytest sets its own between a fixture and its test
        self.master, self.lines, self.row, self.column = master, [""], 0, 0
        self.decoder, self.rest = codecs.getincrementaldecoder("utf-8")(), ""

    def read(self) -> list[str]:
        """Take in what was written, and return the lines."""
        data = b""
        while select.select([self.master], [], [], 0)[0]:
            data += os.read(self.master, 1 << 16)
        whole = self.rest + self.decoder.decode(data)
        end = unfinished.start() if (unfinished := re.search(r"\x1b(\[\??[\d;]*)?$", whole)) else len(whole)
        whole, self.rest = whole[:end], whole[end:]
        for text, control in re.findall(r"([^\x00-\x1f]+)|(\x1b\[\??[\d;]*[A-Za-z]|[\r\n])", whole):
            if text:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
                self.column += len(text)
            else:
                self._obey(control)
        return [line.rstrip() for line in self.lines]

    def _obey(self, control: str) -> None:
        if control == "\r":
            self.column = 0
        elif control == "\n":
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
        elif control[-1] == "A":
            self.row -= int(control[2:-1])
            assert self.row >= 0
        elif control[-1] in "KJ":
            self.lines[self.row] = self.lines[self.row][: self.column]
            if control[-1] == "J":
                del self.lines[self.row + 1 :]
        else:
            assert COLOURS.fullmatch(control) or control in ("\x1b[?7l", "\x1b[?7h"), repr(control)


def resize(descriptor: int, columns: int, lines: int) -> None:
    termios.tcsetwinsize(descriptor, (lines, columns))


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns and 24 rows that stderr is."""
    master, slave = pty.openpty()
    resize(slave, 80, 24)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(terminal, "LOOK_SECONDS", 1000)  # a test that wants drawings says so
    stream = _Terminal(io.BufferedWriter(io.FileIO(slave, "w", closefd=False)), "utf-8", line_buffering=True)
    yield Screen(master, lambda: monkeypatch.setattr(sys, "stderr", stream))
    footer.show(())
    footer._forget()
    os.close(slave)
    os.close(master)


def exit_code(child: int) -> int:
    """Wait for a forked process, and return its exit code; of a signal, its negative number."""
    _, status = wait_for(lambda: (ended := os.waitpid(child, os.WNOHANG))[0] and ended)
    return os.waitstatus_to_exitcode(status)


@contextmanager
def at_work(screen: Screen, workers: int = 3):
    """Yield a table of a run with some workers, a job that has failed and one that is done."""
    screen.attach()
    table = Table()
    with listening(table), Progress("denoising steps", 1000) as progress:
        report_counts({"jobs": 40, "done": 2, "drafted": 3, "failed": 1, "not chosen": 1600, "not tried": 0})
        for number in range(workers):
            report_busy(f"process {number}", (f"night-{number:03d}", "other"), "denoising", 300)
            for _ in range(3):
                report_steps(f"process {number}", f"night-{number:03d}", 4)
                progress.advance(4)
        report_end(f"bad{HOSTILE}[red]", error=f"no [bold]file[/] :smile: {HOSTILE} 日本語 é" + " long" * 100)
        report_end("good", 12.3)
        yield table


def test_each_worker_has_a_row_with_its_job_its_steps_its_speed_and_the_time_left(screen):
    with at_work(screen) as table:
        rows = [COLOURS.sub("", row).split() for row in table.rows(100, 30)]
    for number in range(3):
        (row,) = (row for row in rows if row[:2] == ["process", str(number)])
        assert row[2:6] == [f"night-{number:03d}", "+1", "denoising", "12/300"]
        assert re.fullmatch(r"[\d.]+/s", row[6]) and re.fullmatch(r"\d+s", row[7])


def test_columns_stay_where_they_are_when_a_shorter_job_comes(screen):
    with at_work(screen) as table:
        before = [COLOURS.sub("", row) for row in table.rows(100, 30)]
        for number in range(3):
            report_busy(f"process {number}")
        after = [COLOURS.sub("", row) for row in table.rows(100, 30)]
    assert [row for row in before if "job" in row.split()] == [row for row in after if "job" in row.split()]


def test_the_whole_run_is_counted_and_jobs_that_ended_are_listed(screen):
    with at_work(screen) as table:
        text = COLOURS.sub("", "\n".join(table.rows(250, 30)))
    assert "2 of 40 done, 3 drafted, 1 failed, 34 to make, 1,600 not chosen\n" in text and "36/1,000" in text
    assert "made: good 12.3 s" in text and "failed: bad\\x1b[2J" in text and "[bold]file[/] :smile:" in text


@pytest.mark.parametrize("workers", [0, 1, 100])
@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_the_rows_fit_the_terminal_and_are_safe(screen, columns, lines, workers):
    with at_work(screen, workers) as table:
        rows = [COLOURS.sub("", row) for row in table.rows(columns, lines)]
    assert 1 <= len(rows) <= max(1, lines * 3 // 4)
    assert all(row.isprintable() and cell_len(row) < max(2, columns) for row in rows)
    shown = sum(row.startswith("process ") for row in rows)
    if columns >= 40 and lines >= 24 and workers:
        assert shown == workers or f"+{workers - shown} more" in [row.strip() for row in rows]


def test_an_encoding_without_the_characters_gets_others(screen, monkeypatch):
    with at_work(screen) as table:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
        for columns, lines in SIZES:
            assert "".join(table.rows(columns, lines)).isascii()
        assert "\\u65e5" in "".join(table.rows(200, 30))


def test_no_color_means_no_colours(screen, monkeypatch):
    with at_work(screen) as table:
        assert "\x1b[31m" in "".join(table.rows(80, 24))
        monkeypatch.setenv("NO_COLOR", "1")
        assert not re.search(r"\x1b\[[\d;]*3\dm", "".join(table.rows(80, 24)))


def test_what_others_write_scrolls_above_the_rows_undamaged_and_nothing_is_left_in_the_end(screen):
    screen.attach()
    show("before", error=True)
    footer.show(["table 1", "table 2"])
    assert screen.read() == ["before", "", "table 1", "table 2"]
    show("a log line\nand another", error=True)
    assert screen.read() == ["before", "a log line", "and another", "", "table 1", "table 2"]
    sys.stderr.write("\rlibrary: 10% of much")
    footer.show(["table 3"])
    assert screen.read()[3:] == ["library: 10% of much", "table 3"]
    sys.stderr.write("\rlibrary: done")
    footer.show(["table 4", "table 5"])
    show(HOSTILE, error=True)
    os.write(sys.stderr.fileno(), b"by another program\n")  # which knows nothing of the table
    footer.show(["table 6"])
    footer.show(())
    lines = screen.read()
    assert lines[:3] == ["before", "a log line", "and another"] and "by another program" in lines
    assert not any("table" in line for line in lines) and lines[-1] == ""


def test_more_rows_than_the_terminal_has_are_cut(screen):
    screen.attach()
    resize(sys.stderr.fileno(), 80, 5)
    footer.show([f"row {number}" for number in range(9)])
    assert screen.read() == ["", "row 0", "row 1", "row 2", "row 3"]
    footer.show(["row"])
    assert screen.read() == ["", "row"]


def test_a_table_is_drawn_while_work_goes_on_and_gone_once_it_ends(screen, monkeypatch):
    screen.attach()
    monkeypatch.setattr(terminal, "LOOK_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt), shown_on_terminal(), Progress("ingest", 3) as progress:
        progress.advance(note="loss 0.5")
        wait_for(lambda: any("1/3" in line for line in screen.read()))
        show("a log line", error=True)
        with Progress("validation", 2):
            wait_for(lambda: any("0/2" in line for line in screen.read()))
        wait_for(lambda: not any("0/2" in line for line in screen.read()))
        raise KeyboardInterrupt
    assert list(filter(None, screen.read())) == ["a log line"]
    with shown_on_terminal(), Progress("again", 3):
        wait_for(lambda: any("0/3" in line for line in screen.read()))
    assert list(filter(None, screen.read())) == ["a log line"]


def test_sigterm_removes_the_table_and_ends_the_process(screen):
    screen.attach()
    child = os.fork()
    if child == 0:
        with shown_on_terminal():
            footer.show(["a table"])
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert exit_code(child) == -signal.SIGTERM and not any(screen.read())


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TQDM_DISABLE", "1")])
def test_where_no_table_is_wanted_none_is_drawn(screen, monkeypatch, name, value):
    screen.attach()
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal, "LOOK_SECONDS", 0.01)
    with shown_on_terminal(), Progress("ingest", 3) as progress:
        progress.advance()
    assert not any(screen.read())
    assert (Footer.size() is None) == (name == "TERM")


def test_a_stream_that_is_no_terminal_gets_no_table(monkeypatch, capsys):
    with shown_on_terminal(), Progress("ingest", 3) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


class Watched(Table):
    """A table that keeps its rows at each step, and after each job that has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def stepped(self, worker, id, steps) -> None:
        super().stepped(worker, id, steps)
        self.seen += self.rows(100, 30)

    def counted(self, counts) -> None:
        super().counted(counts)
        self.seen += self.rows(100, 30)


def test_a_run_shows_its_jobs_step_by_step(tmp_path, screen):
    screen.attach()
    bad = {"id": "c", "task": "image_to_video", "image": tmp_path / "none.png"}
    with listening(table := Watched()):
        generate(manifest_of({"id": "a"}, {"id": "b"}, bad), tmp_path, StubModel)
    seen = [" ".join(COLOURS.sub("", row).split()) for row in table.seen]
    assert any(re.fullmatch(r"cpu (a|b|a \+1) denoising (\d+)/\2( .*)?", row) for row in seen)
    assert any("2 of 3 done, 1 failed, 0 to make" in row for row in seen)
    assert any(row.startswith("failed: c: ") for row in seen) and any(row.startswith("made: ") for row in seen)


def test_a_fork_inherits_neither_rows_nor_a_held_lock(screen):
    screen.attach()
    footer.show(["table"])
    held, free = Event(), Event()

    def hold() -> None:
        with footer._lock:
            held.set()
            free.wait()

    holder = Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if child == 0:
        show("from the child", error=True)
        os._exit(0 if not footer._rows else 1)
    assert exit_code(child) == 0
    free.set()
    holder.join()
