"""What could not be made: a file for each piece, so that other processes know that it was tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pusa.files import read_json, write_json
from pusa.precomputing.plan import Piece

Item = dict[str, str]  # key, reason, detail


@dataclass(frozen=True)
class Refusals:
    """The rejects of a folder. Those that were there before this run count for nothing: they are tried again."""

    folder: Path
    earlier: dict[str, int]  # file name -> time

    @classmethod
    def before(cls, folder: Path) -> "Refusals":
        """As they are when a run begins."""
        return cls(folder, {path.name: path.stat().st_mtime_ns for path in cls.files(folder)})

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All of them."""
        return sorted(folder.glob("rejected-*.json"))

    def of(self, piece: Piece) -> list[Item]:
        """What processes of this run found wanting of a piece."""
        path = self._path(piece)
        if not path.is_file() or self.earlier.get(path.name) == path.stat().st_mtime_ns:
            return []
        return _items(path)

    def all(self) -> dict[str, Item]:
        """By key, those of earlier runs too: what was made since is no matter to who asks."""
        return {item["key"]: item for path in self.files(self.folder) for item in _items(path)}

    def write(self, piece: Piece, items: Sequence[Item]) -> None:
        """Say what more of a piece cannot be made: who found the first of it may have died since."""
        write_json(self._path(piece), [*self.of(piece), *items])

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"rejected-{piece.name}.json"


def _items(path: Path) -> list[Item]:
    """What a file says; nothing where it was not written by this."""
    found = read_json(path)
    items = found if isinstance(found, list) else []
    return [item for item in items if isinstance(item, dict) and item.keys() >= {"key", "reason", "detail"}]
