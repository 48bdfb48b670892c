"""YAML files of people: read safely, bounded in size and depth, and with nothing told twice."""

from pathlib import Path
from typing import Any

import yaml

from pusa.errors import ManifestError, PusaError
from pusa.strict import read_text

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 20
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ManifestError: it cannot be read, is too large, no YAML, no mapping, or tells something twice.
    """
    text = read_text(path, MAX_BYTES)
    try:
        _refuse_bombs(text, path)
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, path, loader)
        data = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, PusaError):
            raise
        raise ManifestError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        held = "nothing" if data is None else type(data).__name__
        raise ManifestError(f"{path} holds {held}; a manifest is a mapping that begins with 'kind:'")
    return data


def _refuse_bombs(text: str, path: Path) -> None:
    """A few lines of aliases can expand to gigabytes (the "billion laughs"), and deep nesting overflows the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ManifestError(f"{path}: line {line} uses a YAML alias; manifests may not")
        if depth > MAX_DEPTH:
            raise ManifestError(f"{path}: line {line} is nested more than {MAX_DEPTH} deep")


def _refuse_duplicates(node: Any, path: Path, loader: Any) -> None:
    """YAML lets a later key silently win over an earlier one that means the same (1 and 0x1 do)."""
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ManifestError(f"{path}: line {line} has a list or a mapping for a key")
            if (constructed := loader.construct_object(key)) in seen:
                raise ManifestError(f"{path}: line {line} gives {key.value!r} a second time")
            seen.add(constructed)
            _refuse_duplicates(value, path, loader)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, loader)
