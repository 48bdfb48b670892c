"""What a notice of a run says, whom it goes to, and that it changes nothing about the run."""

import json
import logging
import sys
from pathlib import Path

import pytest

from flows.notices import COMMAND, noticed
from pusa.errors import PartlyFailed, StageError
from pusa.finetune.recipe import ALWAYS_CHANGEABLE
from pusa.finetune.stage import Finetuned
from pusa.generate.stage import Generated
from pusa.ingest.stage import _table_key
from pusa.manifest.common import OPERATION
from pusa.manifest.models import IngestManifest
from tests.system.test_notices import receiving

SOURCE = Path("/manifests/tiny/generate.yaml")


def generated(failed: dict[str, str]) -> Generated:
    videos = Path("/run/videos")
    return Generated(videos, videos / "gallery.html", videos / "gallery.jpg", ["a", "b"], ["c"], failed)


def run(manifest, result=None, error: BaseException | None = None, stage: str = "generate") -> None:
    with noticed(stage, manifest, SOURCE, Path("/run")) as outcome:
        outcome.result = result
        if error is not None:
            raise error


@pytest.fixture
def sent():
    """Return the manifest with addresses, and what its two addresses got."""
    with receiving(200) as ends, receiving(200) as failures:
        yield IngestManifest(source="x", on_end=ends.address, on_failure=failures.address), ends, failures


def test_a_run_that_is_complete_is_no_failure(sent):
    manifest, ends, failures = sent
    run(manifest, generated({}))
    ((_, _, notice),) = ends
    assert failures == [] and notice.pop("seconds") >= 0 and notice.pop("ended")
    assert notice == {
        "text": "generate tiny/generate.yaml: completed: 2 made, 1 made already",
        "run": "generate tiny/generate.yaml",
        "stage": "generate",
        "state": "completed",
        "manifest": "/manifests/tiny/generate.yaml",
        "run_dir": "/run",
        "counts": {
            "made": 2,
            "kept": 1,
            "failed": 0,
            "left": 0,
            "drafted": 0,
            "not_begun": 0,
            "unchosen": 0,
            "waiting": 0,
            "failed_earlier": 0,
            "not_shown": 0,
        },
        "failed": {},
        "error": None,
        "link": None,
    }


def test_a_run_with_failures_names_the_first_of_them(sent):
    manifest, ends, failures = sent
    run(manifest, generated({f"job{i}": f"why\n\x1b[2J{i}" for i in range(30)}))
    assert ends == failures and len(ends) == 1
    notice = ends[0][2]
    assert notice["state"] == "completed with failures" and notice["counts"]["failed"] == 30
    assert len(notice["failed"]) == 20 and notice["failed"]["job0"] == "why\\n\\x1b[2J0"
    assert notice["error"].startswith("30 jobs failed (")


def test_errors_and_interrupts_are_told_apart_and_raised(sent):
    manifest, ends, failures = sent
    for error, state in ((StageError("the disk is gone"), "failed"), (ValueError("odd"), "failed"),
                         (PartlyFailed("two"), "completed with failures"), (KeyboardInterrupt(), "cancelled"),
                         (SystemExit(143), "cancelled")):  # fmt: skip
        with pytest.raises(type(error)):
            run(manifest, error=error)
        assert ends[-1][2]["state"] == state
    assert ends[0][2]["error"] == "the disk is gone" and "the disk is gone" in ends[0][2]["text"]
    assert [notice["state"] for _, _, notice in failures] == ["failed", "failed", "completed with failures"]


def test_the_numbers_of_a_training_are_in_its_notice(sent):
    manifest, ends, _ = sent
    run(
        manifest,
        Finetuned(Path("/run/checkpoints/00000040"), Path("/run/metrics.jsonl"), 40, 40, 0, 0.25),
        stage="finetune",
    )
    numbers = {"steps": 40, "trained_steps": 40, "skipped_steps": 0, "last_loss": 0.25, "ended_early": 0}
    assert ends[0][2]["counts"] == numbers


def test_a_notice_that_is_not_received_costs_a_warning_and_no_more(caplog):
    caplog.set_level(logging.WARNING, logger="pusa")
    with receiving(404) as received:
        run(IngestManifest(source="x", on_end=f"{received.address}/SECRET"), generated({}))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "a notice of this run was not received by 127.0.0.1: the answer is HTTP 404"


def test_an_error_of_the_notice_itself_changes_nothing(sent, caplog):
    manifest, ends, _ = sent
    caplog.set_level(logging.WARNING, logger="pusa")
    run(manifest, result=5)  # no stage returns this
    assert ends == [] and "no notice of this run could be sent: TypeError" in caplog.text


def test_the_workers_command_is_run_without_any_address(tmp_path, monkeypatch):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    monkeypatch.setenv(COMMAND, json.dumps([sys.executable, "-c", code, str(tmp_path / "out")]))
    run(IngestManifest(source="x"), generated({}))
    assert json.loads((tmp_path / "out").read_text())["state"] == "completed"


def test_how_a_run_is_operated_is_part_of_no_result():
    plain = IngestManifest(source="x")
    operated = IngestManifest(
        source="x", on_end="https://a.example/x", on_failure=["env:PUSA_WEBHOOK_X"], min_free_gib=7
    )
    assert {key for key in IngestManifest.model_fields if getattr(plain, key) != getattr(operated, key)} == OPERATION
    assert _table_key(plain, []) == _table_key(operated, [])
    assert OPERATION <= ALWAYS_CHANGEABLE
