"""Which of a repository's files a part of a model needs: never pickles, and bf16 where there is a choice."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from pusa.errors import WeightsError
from pusa.weights import PARTS
from pusa.weights.genmo import FILES

VOCABULARIES = ("tokenizer.json", "spiece.model")
_BF16 = re.compile(r"[^.]+(\.bf16[^.]*\.safetensors|\.safetensors\.index\.bf16\.json)")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")


def choose(files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Of a repository's `files`, those that `parts` need: never pickles, and bf16 where there is a choice.

    Raises:
        WeightsError: a part is missing or not whole.
    """
    index = [file for file in files if file == "model_index.json"]
    return list(dict.fromkeys(index + [file for part in parts for file in _files_of(part, files)]))


def parts_in(files: Sequence[str]) -> list[str]:
    """The parts that a repository has, in whatever layout."""
    there = {file.part for file in FILES if file.name in files} | {
        file.partition("/")[0] for file in files if "/" in file
    }
    return [part for part in PARTS if part in there]


def _files_of(part: str, files: Sequence[str]) -> list[str]:
    if part in files or PurePosixPath(part).suffix:
        return [one(files, part)]
    folder = [file for file in files if str(PurePosixPath(file).parent) == part]
    single = [file.name for file in FILES if file.part == part]
    if not folder and single and set(single) <= set(files):
        return single
    if not folder:
        forms = " or ".join(filter(None, ("a folder", " and ".join(single))))
        raise WeightsError(f"there is no {part!r} ({forms}), but {_some([file.split('/')[0] for file in files])}")
    weights = _weights(folder)
    texts = [file for file in folder if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
    # Networks alone call it config.json: without weights, such a folder was downloaded in part, or has but pickles.
    if part == "tokenizer" and not any(f"{part}/{name}" in texts for name in VOCABULARIES):
        raise WeightsError(f"there is no {' or '.join(VOCABULARIES)} in {part!r}, but {_some(folder)}")
    if not (_whole(weights) if weights else texts and f"{part}/config.json" not in folder):
        raise WeightsError(f"there are no whole safetensors in {part!r}, but {_some(folder)}")
    return texts + weights


def _weights(folder: Sequence[str]) -> list[str]:
    """The safetensors of a folder with their index: those of variant bf16, else those of no variant."""
    for form in (_BF16, _PLAIN):
        found = [file for file in folder if form.fullmatch(PurePosixPath(file).name)]
        if any(file.endswith(".safetensors") for file in found):
            return found
    return []


def _whole(weights: Sequence[str]) -> bool:
    """Whether no shard is missing, nor the index that leads to them."""
    shards = Counter(match.groups() for file in weights if (match := _SHARD.match(file)))
    indexed = not shards or any(".index." in file for file in weights)
    return indexed and all(count == int(total) for (_, total), count in shards.items())


def one(files: Sequence[str], file: str) -> str:
    """The file, if it is among `files`.

    Raises:
        WeightsError: it is not; near misses are named.
    """
    if file not in files:
        near = difflib.get_close_matches(file, files, n=8)
        raise WeightsError(f"there is no file {file!r}, but {_some(near or files)}")
    return file


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8] or ["nothing"]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
