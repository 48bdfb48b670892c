"""One source that fails is recorded and the others are made; what was hashed is what was decoded."""

import errno
import logging
import os
import shutil
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

import flows.ingest
from flows.commands import main
from flows.handover import ManifestFile
from pusa.data.reader import Table
from pusa.errors import ManifestError, PartlyFailed, StageError, TableError
from pusa.ingest import sources, stage, verdicts
from pusa.ingest.stage import ingest
from pusa.ingest.verdicts import VERDICTS, Ledger
from pusa.manifest.models import ClipSettings, IngestManifest
from pusa.system.files import sha256_file
from tests.helpers.media import video

SETTINGS = ClipSettings(num_frames=7, width=64, height=64)
MANIFEST = "kind: ingest\nsource: videos\nclips: {num_frames: 7, width: 64, height: 64}\n"


class PanicException(BaseException):
    """What a library in Rust raises."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Videos with captions: 0 and 1, and some to be added."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("0", "1", "bad", "other")):
        video(folder / f"{name}.mp4", count=8, seed=seed)
    return folder


@pytest.fixture
def videos(made, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in made.glob("[01].*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def bad(made, videos):
    """A third video, which is good."""
    for path in made.glob("bad.*"):
        shutil.copy(path, videos)


def run(tmp_path, source="videos", **settings):
    result = ingest(IngestManifest(source=tmp_path / source, clips=SETTINGS, **settings), tmp_path / "run")
    return result, Table.open(result.table)


def rejects(table):
    return {
        row["source"].rpartition("/")[2]: (row["reason"], row["detail"]) for row in table.read("rejects").to_pylist()
    }


def clip_hashes(table):
    return table.read("clips")["source_sha256"].to_pylist()


def decoded(caplog):
    counts = [int(message.split()[0]) for message in caplog.messages if message.endswith("are to be decoded")]
    caplog.clear()
    return counts[-1] if counts else None


def failing(monkeypatch, module, name, error, source="bad"):
    """Let a function fail when it works for a source."""
    function = getattr(module, name)

    def fail(*arguments, **named):
        if any(source in str(argument) for argument in arguments):
            raise error
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, fail)


# the step that fails, and what it raises
STEPS = {
    "survey_video": RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace"),
    "DecoderChooser": PanicException("called `Option::unwrap()` on a `None` value"),
    "hash_regular_file": OSError(errno.EIO, "Input/output error"),
    "stamp_of": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
}


def test_a_source_that_fails_at_any_step_is_a_reject_and_is_tried_again(videos, made, tmp_path, monkeypatch):
    for step, error in STEPS.items():
        for suffix in (".mp4", ".txt"):
            shutil.copy(made / f"bad{suffix}", videos / f"{step}{suffix}")
        failing(monkeypatch, verdicts, step, error, step)
    result, table = run(tmp_path, duplicates="keep")
    assert (result.clips, result.rejects, result.failed) == (2, len(STEPS), len(STEPS))
    traces = {path.name: path.read_text() for path in (tmp_path / "run/clips/failures").iterdir()}
    for step, (reason, detail) in rejects(table).items():
        message, _, trace = detail.partition(" (its traceback is in failures/")
        assert reason == "failed" and message.startswith(type(STEPS[step[:-4]]).__name__) and "\n" not in detail
        assert "Traceback" in traces.pop(trace[:-1])
    assert not traces
    with pytest.raises(PartlyFailed, match=f"{len(STEPS)} sources failed"):
        result.require_all()
    monkeypatch.undo()
    result, table = run(tmp_path, duplicates="keep")
    assert (result.clips, result.failed) == (2 + len(STEPS), 0) and not (tmp_path / "run/clips/failures").exists()
    result.require_all()
    assert run(tmp_path, duplicates="keep")[0].skipped


def test_a_verdict_that_cannot_be_stored_does_not_stop_the_others(videos, bad, tmp_path, monkeypatch):
    examine = verdicts._examine

    def impossible(path, *arguments):
        facts = examine(path, *arguments)
        return facts | {"source_width": 2**40} if path.stem == "bad" else facts

    monkeypatch.setattr(verdicts, "_examine", impossible)
    result, table = run(tmp_path)
    assert result.clips == 2 and rejects(table)["bad.mp4"][0] == "failed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (StageError("a decoder process did not start"), StageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_is_everybodys_fault_ends_the_run(videos, bad, tmp_path, monkeypatch, error, kind):
    failing(monkeypatch, verdicts, "survey_video", error)
    with pytest.raises(kind):
        run(tmp_path)
    with pytest.raises(TableError, match=r"no index\.json"):
        Table.open(tmp_path / "run/clips")


def test_too_many_open_files_do_not_make_a_source_unreadable(videos, tmp_path, monkeypatch):
    real = os.open

    def exhausted(path, *arguments, **named):
        if str(path).endswith("1.mp4"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        run(tmp_path)


def test_an_error_while_duplicates_are_sought_costs_no_verdict(videos, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr("pusa.ingest.outcomes.find_near_duplicates", no_memory)
    with pytest.raises(MemoryError):
        run(tmp_path)
    monkeypatch.undo()
    caplog.clear()
    assert run(tmp_path)[0].clips == 2 and decoded(caplog) == 0


def test_a_failure_does_not_replace_a_good_table(videos, tmp_path, monkeypatch):
    """Nor does it together with rejects that stay: the sources that are left may all be bad for good."""
    (videos / "text.mp4").write_text("not a video")
    (videos / "text.txt").write_text("a caption")
    before = run(tmp_path)[1].read("clips")
    for path in videos.glob("[01].mp4"):
        path.rename(path.with_name(f"bad{path.name}"))
        path.with_suffix(".txt").rename(path.with_name(f"bad{path.stem}.txt"))
    failing(monkeypatch, verdicts, "survey_video", MemoryError())
    with pytest.raises(
        StageError, match=r"none of 3 sources can be used now.*failed.*the table of the previous run is kept"
    ):
        run(tmp_path)
    assert Table.open(tmp_path / "run/clips").read("clips") == before


def test_the_command_ends_with_3_once_all_else_is_done(videos, bad, tmp_path, monkeypatch, capsys):
    (videos / "text.mp4").write_text("not a video")
    (videos / "text.txt").write_text("a caption")
    (tmp_path / "ingest.yaml").write_text(MANIFEST)
    command = ["ingest", str(tmp_path / "ingest.yaml"), "--run-dir", str(tmp_path / "run"), "--no-prefect"]
    failing(monkeypatch, verdicts, "survey_video", MemoryError())
    assert main(command) == 3
    out, err = capsys.readouterr()
    assert "1 sources failed with unexpected errors" in err and "clips: 2" in out
    assert Table.open(tmp_path / "run/clips").rows("clips") == 2
    monkeypatch.undo()
    assert main(command) == 0, "an expected reject is no failure"


def test_the_flow_shows_its_page_and_completes_with_failures(videos, bad, tmp_path, monkeypatch):
    failing(monkeypatch, verdicts, "survey_video", MemoryError())
    result, _ = run(tmp_path)
    shown = []

    @contextmanager
    def reporting(page):
        shown.append(page.look("").text())
        yield

    monkeypatch.setattr(flows.ingest.steps, "ingest", lambda *arguments: result)
    monkeypatch.setattr(flows.ingest.live, "reporting", reporting)
    (tmp_path / "ingest.yaml").write_text(f"kind: ingest\nsource: {tmp_path}/videos\n")
    state = flows.ingest.ingest.fn(ManifestFile(path=tmp_path / "ingest.yaml"), tmp_path / "run")
    assert "| failed |" in shown[0] and (state.name, state.type) == ("Completed with failures", "COMPLETED")


def replace(path, other):
    """Replace a file by another one, with the size and the time of the first: as `cp -p` or rsync may do."""
    stat, data = path.stat(), other.read_bytes()
    assert len(data) <= stat.st_size
    new = path.with_name(".new")
    new.write_bytes(data + bytes(stat.st_size - len(data)))
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)
    assert path.stat()[6:9:2] == stat[6:9:2]


@pytest.fixture
def other(made, videos):
    """A shorter file than the videos, and padding at the end of the first video."""
    with (videos / "0.mp4").open("ab") as file:
        file.write(bytes(4096))
    return made / "other.mp4"


@pytest.mark.parametrize("step", ["survey_video", "hash_regular_file"])
def test_a_source_that_is_replaced_while_it_is_read_is_changed_and_tried_again(
    videos, other, tmp_path, monkeypatch, step
):
    function = getattr(verdicts, step)

    def replace_after(path, *arguments, **named):
        result = function(path, *arguments, **named)
        if path.name == "0.mp4":
            replace(path, other)
        return result

    monkeypatch.setattr(verdicts, step, replace_after)
    result, table = run(tmp_path)
    assert result.failed == 0 and rejects(table)["0.mp4"][0] == "changed" and table.rows("clips") == 1
    monkeypatch.undo()
    _, table = run(tmp_path)
    assert clip_hashes(table) == [sha256_file(videos / f"{i}.mp4") for i in (0, 1)]


def test_a_fault_of_a_file_that_was_being_replaced_is_not_kept(videos, tmp_path, monkeypatch):
    function = verdicts.survey_video

    def write_while_reading(path, *arguments, **named):
        if path.name == "0.mp4":
            path.write_bytes(path.read_bytes()[:100])
        return function(path, *arguments, **named)

    monkeypatch.setattr(verdicts, "survey_video", write_while_reading)
    assert rejects(run(tmp_path)[1])["0.mp4"][0] == "changed"


def test_a_source_of_equal_size_and_time_between_two_runs_is_noticed(videos, other, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    before = clip_hashes(run(tmp_path)[1])
    replace(videos / "0.mp4", other)
    result, table = run(tmp_path)
    after = clip_hashes(table)
    assert not result.skipped and after == [sha256_file(videos / f"{i}.mp4") for i in (0, 1)] != before
    assert run(tmp_path)[0].skipped


def test_a_source_with_another_ctime_only_is_hashed_and_not_decoded(videos, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    before = run(tmp_path)[1].read("clips")
    os.link(videos / "0.mp4", tmp_path / "link.mp4")
    caplog.clear()
    monkeypatch.setattr(stage, "judge", lambda *arguments: 1 / 0)
    result, table = run(tmp_path)
    assert "1 others may have been replaced" in caplog.text and decoded(caplog) == 0 == result.failed
    assert table.read("clips") == before and run(tmp_path)[0].skipped
    (videos / "0.txt").write_text("another caption")
    assert run(tmp_path)[0].failed == 0 and "replaced" not in caplog.text, "the new stamp is in the ledger"


def test_a_ledger_of_an_earlier_version_saves_the_decoding(videos, tmp_path, monkeypatch):
    before = run(tmp_path)[1].read("clips")
    (path,) = (tmp_path / "run/clips/ledger").glob("*.parquet")
    old = pq.read_table(path).drop_columns(["ctime_ns"])
    path.unlink()
    pq.write_table(old, path.with_name(f"{path.name[:25]}.parquet"), write_page_checksum=True)
    (tmp_path / "run/clips/index.json").unlink()
    monkeypatch.setattr(stage, "judge", lambda *arguments: 1 / 0)
    result, table = run(tmp_path)
    assert result.failed == 0 and table.read("clips") == before
    (path,) = (tmp_path / "run/clips/ledger").glob("*.parquet")
    assert pq.read_schema(path).names == VERDICTS.names


def test_no_changed_bit_of_a_ledger_is_believed(videos, tmp_path, caplog):
    run(tmp_path)
    folder = tmp_path / "run/clips/ledger"
    (path,) = folder.glob("*.parquet")
    data, key = path.read_bytes(), path.name[:16]
    for place in [*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with Ledger.open(folder, key) as ledger:
            assert ledger.stamps() == {}
        assert not path.exists()
    path.write_bytes(data)
    with Ledger.open(folder, key) as ledger:
        assert len(ledger.stamps()) == 2


def test_a_metadata_file_that_changes_while_it_is_read_is_refused(videos, tmp_path, monkeypatch):
    rows = videos / "metadata.jsonl"
    rows.write_text('{"file_name": "0.mp4", "text": "a"}\n')
    read_rows = sources.read_rows

    def append(*arguments):
        yield from read_rows(*arguments)
        with rows.open("a") as file:
            file.write('{"file_name": "1.mp4", "text": "b"}\n')

    monkeypatch.setattr(sources, "read_rows", append)
    with pytest.raises(ManifestError, match="was changed while it was read"):
        run(tmp_path)
