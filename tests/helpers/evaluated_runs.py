"""Folders of runs with records of videos that nobody made: as many as a test needs, in no time."""

import json
from pathlib import Path

from pusa.system.files import own_digest

JOB = {"task": "image_to_video", "prompt": "a boat", "seed": 3, "width": 64, "height": 48, "num_frames": 7, "steps": 8}


def done(video: Path | None = None, numbers=None, **job) -> dict:
    """Return what `put_run` writes of a video that is made; without numbers it is of an earlier version."""
    known = {} if numbers is None else {"numbers": numbers}
    return {"record": {"status": "done", "key": "k", **known}, "job": {**JOB, **job}, "video": video}


def failed(error="none.txt is not a picture", **job) -> dict:
    return {"record": {"status": "failed", "error": error}, "job": {**JOB, **job}, "video": None}


def waiting(**job) -> dict:
    return {"record": None, "job": {**JOB, **job}, "video": None}


def put_run(run: Path, jobs: dict[str, dict], listed: bool = True) -> Path:
    """Write the run of these jobs; without a list of them, as calls from Python leave it."""
    videos = run / "videos"
    (videos / ".work").mkdir(parents=True)
    for id, job in jobs.items():
        if job["record"] is not None:
            (videos / f"{id}.json").write_text(json.dumps({"id": id, "job": job["job"], **job["record"]}))
        if job["video"]:
            (videos / f"{id}.mp4").hardlink_to(job["video"])
        elif (job["record"] or {}).get("status") == "done":
            (videos / f"{id}.mp4").touch()
    if listed:
        rows = [{"id": id, "key": "k", "latents_key": "", "settings": job["job"]} for id, job in jobs.items()]
        content = {"version": 1, "weights": {}, "jobs": rows}
        (videos / ".work/jobs.json").write_text(json.dumps({**content, "sha256": own_digest(content)}))
    return run
