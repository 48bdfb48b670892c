"""Parse YAML as manifests use it: limits on size and depth, no aliases, no key twice, and decimal numbers only.

YAML 1.1 has other ways to write numbers: 010 is 8, 0x1F is 31, 1_000 is 1000 and 1:30 is 90, but 1e3 is text. Here 010
is 10 and 1e3 is a number, as in YAML 1.2; 0x1F, 0o17, 1_000 and 1:30 are text, which no key accepts as a number.
"""

import re
from typing import Any, ClassVar

import yaml

from pusa.errors import ManifestError

MAX_DEPTH, MAX_VALUES = 20, 2_000_000  # more values would need more than 1 GB and 20 s
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBERS = {
    INT: re.compile(r"[-+]?[0-9]{1,4000}\Z"),  # Python refuses to convert many more digits
    FLOAT: re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
    ),
}
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C where it is installed


class _Loader(_Base):  # type: ignore[misc]
    """A safe loader with these numbers. Booleans and dates are those of YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in NUMBERS]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return the number of a node, which may have its tag from the file: !!int "010"."""
        text = self.construct_scalar(node)
        if not any(NUMBERS[tag].match(text) for tag in {INT, node.tag}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{text!r:.80} is not a decimal number", node.start_mark
            )
        return int(text) if node.tag == INT else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
    _Loader.add_constructor(_tag, _Loader.construct_number)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text; None if it is empty.

    Args:
        text: the text.
        source: where it came from, for the messages.

    Raises:
        ManifestError: it is not YAML, is too deep, or has an alias or a repeated key.
    """
    try:
        _check_size(text, source)
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_keys(node, source, loader)
        return loader.construct_document(node) if node is not None else None
    except ManifestError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:  # the last three: !!bool maybe
        raise ManifestError(f"{source} is not YAML: {error}") from error


def _check_size(text: str, source: str) -> None:
    """Refuse aliases, which can expand to gigabytes (the "billion laughs"), deep nesting, and too many values."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ManifestError(f"{source}: line {line} uses a YAML alias, which manifests do not allow")
        if count > MAX_VALUES:
            raise ManifestError(f"{source} has more than {MAX_VALUES:,} keys and values by line {line}; split it")
        if depth > MAX_DEPTH:
            raise ManifestError(f"{source}: line {line} is nested more than {MAX_DEPTH} levels deep")


def _check_keys(node: Any, source: str, loader: Any) -> None:
    """Refuse repeated keys: in YAML a later one silently replaces an earlier one with the same value (1 and 01)."""
    if isinstance(node, yaml.MappingNode):
        keys: set[Any] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ManifestError(f"{source}: line {line} has a list or a mapping as a key")
            if (constructed := loader.construct_object(key)) in keys:
                raise ManifestError(f"{source}: line {line} has the key {key.value!r} a second time")
            keys.add(constructed)
            _check_keys(value, source, loader)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, source, loader)
