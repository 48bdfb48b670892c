"""Find the sweeps among a run's jobs, and the grid of their values.

A record does not say which entry of the manifest its job came from. But a sweep writes its values into the ids
(`grid-surf-multiplier0.2-seed1`), and its jobs differ in these values only. Both are checked here: jobs are a grid if
each id ends with exactly the parts that a sweep makes of the job's own settings, every combination of the values is
there once, and all other settings are equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pusa.errors import ManifestError
from pusa.manifest.expansion import id_part, paths_in
from pusa.registry import find
from pusa.tasks import TASKS

Jobs = Mapping[str, Mapping[str, Any]]  # id -> settings


@dataclass(frozen=True)
class Axis:
    """A swept key with its values, in the order of the jobs."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Grid:
    """The jobs of a sweep.

    Attributes:
        base: what their ids begin with.
        axes: the swept keys that have several values, the outermost first.
        ids: the jobs by the place of their values on each axis.
    """

    base: str
    axes: tuple[Axis, ...]
    ids: Mapping[tuple[int, ...], str]


def find_grids(jobs: Jobs) -> list[Grid]:
    """Return the grids of jobs, in the order of their first jobs. Each job is in at most one, and no grid has only one.

    Where ids can be read in several ways, the larger grid counts, then the one with more axes.
    """
    order = {id: place for place, id in enumerate(jobs)}
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[str, tuple[str, ...]]]] = {}
    for id, settings in jobs.items():
        for base, swept in _readings(id, settings):
            group = groups.setdefault((base, tuple(key for key, _ in swept)), [])
            group.append((id, tuple(part for _, part in swept)))
    taken: set[str] = set()
    grids = []
    for (base, keys), members in sorted(groups.items(), key=lambda entry: (-len(entry[1]), -len(entry[0][1]))):
        if taken.isdisjoint(id for id, _ in members) and (grid := _grid(base, keys, dict(members), jobs)):
            taken.update(grid.ids.values())
            grids.append(grid)
    return sorted(grids, key=lambda grid: min(order[id] for id in grid.ids.values()))


def _readings(id: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Yield each way to read an id as a base and the parts of swept keys, each with its key."""
    parts = dict(_parts(id, settings))
    unread: list[tuple[str, tuple[tuple[str, str], ...]]] = [(id, ())]
    while unread:
        rest, read = unread.pop()
        for key, part in parts.items():
            base = rest.removesuffix(f"-{part}")
            if base and base != rest and key not in dict(read):
                unread.append((base, ((key, part), *read)))
                yield unread[-1]


def _parts(id: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that an id may have swept values of, and the part of an id that a sweep makes of each value."""
    task = settings.get("task")
    fields = find(TASKS, task, "task").model_fields if isinstance(task, str) and task in TASKS else {}
    for key, value in settings.items():
        items = value if isinstance(value, list) else [value]
        if key not in fields or f"-{key}" not in id or any(isinstance(item, list | dict) for item in items):
            continue
        is_path = () in dict(paths_in(fields[key].annotation, value))
        try:
            yield key, key + id_part(value, Path(value).stem if is_path else None)
        except ManifestError:
            continue  # no sweep has this value


def _grid(base: str, keys: Sequence[str], members: Mapping[str, tuple[str, ...]], jobs: Jobs) -> Grid | None:
    """Return the grid of jobs with these parts of ids; None if they are not one sweep."""
    axes = [tuple(dict.fromkeys(parts)) for parts in zip(*members.values(), strict=True)]  # the parts along each key
    by_parts = {parts: id for id, parts in members.items()}
    fixed = [{key: value for key, value in jobs[id].items() if key not in (*keys, "id")} for id in members]
    is_whole = len(members) > 1 and by_parts.keys() == set(product(*axes)) and len(by_parts) == len(members)
    if not is_whole or any(other != fixed[0] for other in fixed):
        return None
    long = [place for place, parts in enumerate(axes) if len(parts) > 1]
    places = {tuple(axes[axis].index(parts[axis]) for axis in long): id for parts, id in by_parts.items()}
    values = [{parts[axis]: jobs[id][keys[axis]] for parts, id in by_parts.items()} for axis in long]
    named = [
        Axis(keys[axis], tuple(known[part] for part in axes[axis])) for axis, known in zip(long, values, strict=True)
    ]
    return Grid(base, tuple(named), dict(sorted(places.items())))
