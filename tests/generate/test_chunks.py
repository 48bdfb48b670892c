"""Which jobs go next into which slot: order, readiness, sizes, and jobs that kill their worker."""

from threading import Thread

from pusa.generate.chunks import CHUNK_JOBS, MAX_CRASHES, Chunk, Schedule
from pusa.generate.timings import Timings
from pusa.tasks.text_to_video import TextToVideo

QUICK = {"width": 64, "height": 64, "num_frames": 31, "steps": 2}


def job(id: str, **settings) -> TextToVideo:
    return TextToVideo(id=id, task="text_to_video", **{**QUICK, **settings})


def schedule_of(
    batches, reads=None, slots=1, timings=None, seconds=40.0, look=lambda batch: True, todo=None
) -> Schedule:
    ids = [job.id for batch in batches for job in batch] if todo is None else todo
    return Schedule([tuple(batch) for batch in batches], ids, reads or {}, slots, timings or Timings(), seconds, look)


def timed(seconds: float) -> Timings:
    timings = Timings()
    timings.add(job("earlier"), seconds)
    return timings


def ids_of(chunk) -> list[str]:
    return [job.id for job in chunk.jobs]


def end(schedule: Schedule, chunk) -> None:
    for id in ids_of(chunk):
        schedule.settle(id)
    schedule.give_back(chunk)


def test_the_first_chunk_shows_how_long_a_job_takes_and_the_next_lasts_as_long_as_it_should():
    jobs = [job(f"j{i}") for i in range(12)]
    timings = Timings()
    schedule = schedule_of([[one] for one in jobs], timings=timings)
    first = schedule.take()
    assert ids_of(first) == ["j0"]
    timings.add(jobs[0], 10)
    end(schedule, first)
    assert ids_of(schedule.take()) == ["j1", "j2", "j3", "j4"]


def test_a_chunk_has_a_bounded_number_of_jobs_and_whole_batches():
    batches = [[job(f"{i}-{k}") for k in range(30)] for i in range(5)]
    chunk = schedule_of(batches, timings=timed(0.001)).take()
    assert len(chunk.jobs) == CHUNK_JOBS // 30 * 30


def test_a_chunk_is_named_by_what_it_makes_and_its_places_in_the_manifest():
    jobs = [job("a"), job("b"), job("c", num_frames=7), job("d")]
    positions = {"a": 64, "b": 65, "c": 66, "d": 71}
    assert Chunk(((jobs[0],),), frozenset("a")).describe(positions) == "text_to_video 64x64x31, job 64 (a)"
    assert Chunk(((jobs[0], jobs[1]), (jobs[3],)), frozenset("abd")).describe(positions) == (
        "text_to_video 64x64x31, jobs 64-65, 71"
    )
    named = Chunk((tuple(jobs),), frozenset("abcd")).describe(positions)
    assert named == "text_to_video 64x64x31 and 1 other kind, jobs 64-66, 71"


def test_several_slots_share_what_is_left():
    schedule = schedule_of([[job(f"j{i}")] for i in range(8)], slots=2, timings=timed(1))
    assert [len(schedule.take().jobs) for _ in range(2)] == [2, 1]  # a quarter of what is left, each time


def test_a_job_waits_for_those_it_reads_and_is_given_out_once():
    schedule = schedule_of([[job("a")], [job("b")], [job("c")]], {"b": ["a"]}, timings=timed(1))
    chunk = schedule.take()
    assert ids_of(chunk) == ["a", "c"]
    taken = []
    waiting = Thread(target=lambda: taken.append(schedule.take()))
    waiting.start()
    end(schedule, chunk)
    waiting.join()
    assert ids_of(taken[0]) == ["b"]
    end(schedule, taken[0])
    assert schedule.take() is None


def test_a_batch_keeps_its_jobs_that_are_made_already():
    schedule = schedule_of([[job("a"), job("b")]], todo=["b"])
    chunk = schedule.take()
    assert ids_of(chunk) == ["a", "b"] and chunk.todo == {"b"}
    schedule.settle("b")
    assert schedule.take() is None


def test_jobs_that_another_process_holds_are_looked_at_again():
    held = {"a"}
    looks = []

    def look(batch):
        looks.append(batch[0].id)
        if looks.count("a") == 3:
            held.clear()
        return batch[0].id not in held

    schedule = schedule_of([[job("a")], [job("b")]], look=look)
    end(schedule, schedule.take())
    assert ids_of(schedule.take()) == ["a"] and looks.count("a") == 3


def test_a_look_at_locks_begins_where_the_last_one_ended(monkeypatch):
    monkeypatch.setattr("pusa.generate.chunks.SECONDS_BETWEEN_LOOKS", 0)
    looks = []

    def look(batch):
        looks.append(batch[0].id)
        assert len(looks) < 9, "the others never have a turn"
        return batch[0].id == "c"

    assert ids_of(schedule_of([[job("a")], [job("b")], [job("c")]], look=look).take()) == ["c"]
    assert looks == ["a", "b", "c"]


def test_a_schedule_that_has_ended_gives_out_nothing_more():
    schedule, taken = schedule_of([[job("a")]]), []
    schedule.take()
    waiting = Thread(target=lambda: taken.append(schedule.take()))
    waiting.start()
    schedule.end()
    waiting.join()
    assert taken == [None]


def test_a_job_that_a_look_settles_is_not_given_out():
    def look(batch):
        schedule.settle(batch[0].id)
        return True

    schedule = schedule_of([[job("a")], [job("b")]], look=look)
    assert schedule.take() is None and not schedule.is_left("a") and not schedule.is_left("b")


def test_a_job_that_kills_its_worker_is_found_and_given_up_and_costs_no_other():
    jobs = {id: job(id) for id in "abcd"}
    schedule, given_up, made = schedule_of([jobs.values()]), [], []
    while chunk := schedule.take():
        if "c" in ids_of(chunk):
            for one in schedule.crashed(chunk, ids_of(chunk)):
                given_up.append(one.id)
                schedule.settle(one.id)
        else:
            made += ids_of(chunk)
            end(schedule, chunk)
        schedule.give_back(chunk)
    assert made == ["a", "b", "d"] and given_up == ["c"] and MAX_CRASHES == 3


def test_a_batch_whose_worker_dies_is_made_again_as_it_was_and_only_then_job_by_job():
    schedule = schedule_of([[job("a"), job("b")], [job("c")]], timings=timed(1), seconds=2)
    for _ in range(2):
        chunk = schedule.take()
        assert ids_of(chunk) == ["a", "b"]
        schedule.crashed(chunk, ["b"])
        schedule.give_back(chunk)
        if schedule.is_left("c"):
            end(schedule, schedule.take())
    assert ids_of(schedule.take()) == ["a"] and ids_of(schedule.take()) == ["b"]


def test_of_four_jobs_that_all_kill_their_worker_one_is_given_up_before_the_run_ends():
    schedule, given_up = schedule_of([[job(id)] for id in "abcd"]), []
    for _ in range(2 * MAX_CRASHES):
        chunk = schedule.take()
        for one in schedule.crashed(chunk, ids_of(chunk)):
            given_up.append(one.id)
            schedule.settle(one.id)
        schedule.give_back(chunk)
    assert given_up == ["a"]


def test_only_the_jobs_at_work_are_suspects():
    schedule = schedule_of([[job("a")], [job("b")]], timings=timed(1))
    chunk = schedule.take()
    for _ in range(MAX_CRASHES - 1):
        assert schedule.crashed(chunk, ["b"]) == []
    assert [one.id for one in schedule.crashed(chunk, ["b"])] == ["b"]
    assert schedule.crashed(chunk, ["a"]) == []
