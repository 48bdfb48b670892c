import errno
import os
import subprocess
import sys

import pytest

from pusa.errors import MediaError, PartlyFailed, PusaError, StageError, WeightsError
from pusa.system.failures import Failure, PartialFailures, attempt
from tests.helpers.processes import python


class PanicException(BaseException):
    """As libraries in Rust raise it."""


class AcceleratorError(RuntimeError):
    """As torch raises it when a GPU is lost."""


def failing(error):
    def make():
        raise error

    return make


def chained(error, cause):
    def make():
        raise error from cause

    return make


def test_a_result_is_returned(tmp_path):
    assert attempt(lambda: 3, tmp_path) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127]\nmore"), OSError(errno.EISDIR, "Is a directory", "a.mp4"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), MemoryError(), RecursionError("deep"), KeyError("x"),
        PanicException("index out of bounds"),
    ],
)  # fmt: skip
def test_any_librarys_error_is_one_items(tmp_path, error):
    failure = attempt(failing(error), tmp_path)
    assert isinstance(failure, Failure) and isinstance(attempt(failing(error), None), Failure)
    assert failure.message.startswith(type(error).__name__) and "\n" not in failure.message
    assert "raise error" in failure.traceback
    assert not list(tmp_path.iterdir())


def test_our_own_error_needs_no_traceback(tmp_path):
    assert attempt(failing(MediaError("a.mp4 is empty")), tmp_path) == Failure("a.mp4 is empty")


@pytest.mark.parametrize(
    "make",
    [
        failing(OSError(errno.ENOSPC, "No space left on device")), failing(OSError(errno.EROFS, "Read-only")),
        failing(OSError(errno.EMFILE, "Too many open files")), failing(WeightsError("no vae")),
        failing(StageError("taken")), failing(AcceleratorError("CUDA error")), failing(KeyboardInterrupt()),
        failing(SystemExit(1)), chained(PusaError("cannot write"), OSError(errno.ENOSPC, "No space")),
    ],
)  # fmt: skip
def test_an_error_of_the_whole_run_is_raised(tmp_path, make):
    with pytest.raises((OSError, PusaError, AcceleratorError, KeyboardInterrupt, SystemExit)):
        attempt(make, tmp_path)


def test_a_folder_that_is_gone_ends_the_run_whatever_the_item_raised(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        attempt(failing(MediaError("ffmpeg failed")), tmp_path / "gone")


def test_a_folder_that_takes_no_more_bytes_is_named(tmp_path):
    script = (
        "import resource, pathlib; from pusa.system.failures import attempt\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"attempt(lambda: int('x'), pathlib.Path({str(tmp_path)!r}))"
    )
    words = subprocess.run(python(script), capture_output=True, text=True).stderr.splitlines()[-1]
    assert words == f"OSError: [Errno 27] File too large: {str(tmp_path)!r}" and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_ends_the_run(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        attempt(failing(MediaError("ffmpeg failed")), tmp_path)


def test_a_traceback_is_bounded(tmp_path):
    def deep(count):
        return deep(count - 1) + 1 if count else 1 / 0

    failure = attempt(lambda: deep(sys.getrecursionlimit() // 2), tmp_path)
    assert len(failure.traceback) <= 20_000 and failure.traceback.rstrip().endswith("division by zero")


def test_stages_after_a_partial_failure_run_and_the_failure_is_reported_at_the_end():
    failures, ran = PartialFailures(), []
    for message in ("a", "", "b"):
        with failures.collected():
            ran.append(message)
            if message:
                raise PartlyFailed(message)
    assert ran == ["a", "", "b"]
    with pytest.raises(PartlyFailed, match="a\n  b"):
        failures.require_none()
