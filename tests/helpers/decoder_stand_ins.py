"""Functions that a child process runs in place of a decoder: they answer, fail, hang or crash."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np

from pusa.errors import MediaError, Rejected


def twice(path):
    return {"path": path, "pid": os.getpid()}, np.arange(12, dtype=np.int16).reshape(3, 4) * 2


def process_id():
    return {"pid": os.getpid()}, None


def empty_array():
    return {}, np.zeros((0, 8, 8, 3), np.uint8)


def large_array(rows, width):
    return {}, np.repeat(np.arange(rows, dtype=np.uint8)[:, None], width, 1)


def hang(started=None):
    """Never return. The file `started` is made when the hang has begun."""
    if started is not None:
        Path(started).touch()
    while True:
        time.sleep(3600)


def hang_with_a_child():
    subprocess.run(["sleep", "3600"], check=True)


def abort():
    os.abort()


def exit_with_3():
    os._exit(3)


def divide_by_zero():
    raise ZeroDivisionError("our own fault")


def reject():
    raise Rejected("damaged", "it is torn")


def raise_media_error():
    raise MediaError("no good")
