"""The order of jobs that read what others write: sources first, then by priority, then as the manifest has them."""

import random

import pytest

from pusa.generate.outputs import Outputs
from tests.helpers.stub_model import manifest_of


def outputs_of(tmp_path, *jobs: tuple[str, int, list[str]]) -> Outputs:
    """Return the outputs of jobs with a name, a priority, and the names of one or two jobs whose videos they read."""
    videos = tmp_path / "videos"

    def keys(id, priority, reads):
        if not reads:
            return {"id": id, "priority": priority}
        start, end = videos / f"{reads[0]}.mp4", videos / f"{reads[-1]}.mp4"
        return {"id": id, "priority": priority, "task": "transition", "start": start, "end": end}

    return Outputs(videos, manifest_of(*(keys(*job) for job in jobs)).jobs)


def ids(outputs: Outputs) -> list[str]:
    return [job.id for job in outputs.in_order()[0]]


ORDERS = {
    "as the manifest has them": ([("a", 0, []), ("b", 0, []), ("c", 0, [])], "a b c"),
    "by priority": ([("a", -1, []), ("b", 0, []), ("c", 2, []), ("d", 2, [])], "c d b a"),
    "sources first": ([("a", 0, ["c"]), ("b", 0, []), ("c", 0, [])], "b c a"),
    "sources have the priority of what waits for them": (
        [("a", 1, []), ("b", 5, ["d"]), ("c", 0, []), ("d", 0, ["c"])], "c d b a"),
    "a source's own priority is kept where it is higher": ([("a", 0, []), ("b", -3, ["c"]), ("c", 1, [])], "c a b"),
    "circles are left out, with what waits for them": (
        [("a", 9, ["b"]), ("b", 9, ["a"]), ("c", 9, ["a", "d"]), ("d", 0, []), ("e", 9, ["e"]), ("f", 1, [])], "f d"),
}  # fmt: skip


@pytest.mark.parametrize("jobs, order", ORDERS.values(), ids=ORDERS)
def test_the_order_of_jobs(tmp_path, jobs, order):
    outputs = outputs_of(tmp_path, *jobs)
    assert ids(outputs) == order.split()
    assert {*outputs.in_order()[1]} == {id for id, _, _ in jobs} - set(order.split())


def test_the_jobs_that_a_job_reads(tmp_path):
    outputs = outputs_of(tmp_path, ("a", 0, []), ("b", 0, ["a"]), ("c", 0, ["b", "a"]), ("d", 0, ["none"]))
    assert [outputs.reads(job) for job in outputs.in_order()[0]] == [[], ["a"], ["b", "a"], []]
    assert Outputs().in_order() == ([], {})


def test_the_order_is_that_of_always_taking_the_most_urgent_job_that_is_ready(tmp_path):
    draw = random.Random(0)
    for _ in range(30):
        names = [f"j{i}" for i in range(12)]
        reads = {n: draw.sample(names[:i], k=min(i, draw.choice([0, 0, 1, 2]))) for i, n in enumerate(names)}
        priority = {n: draw.choice([-1, 0, 0, 3]) for n in names}
        listed = draw.sample(names, len(names))

        def urgency(name, priority=priority, reads=reads):
            waiting = (urgency(other) for other in reads if name in reads[other])
            return max([priority[name], *waiting])

        expected: list[str] = []
        while len(expected) < len(names):
            ready = [n for n in listed if n not in expected and set(reads[n]) <= set(expected)]
            expected.append(max(ready, key=urgency))  # the first of equals
        assert ids(outputs_of(tmp_path, *((n, priority[n], reads[n]) for n in listed))) == expected
