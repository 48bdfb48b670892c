"""What could not be made: a file for each piece, so that other processes know that it was tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pusa.files import read_json, write_json
from pusa.precomputing.plan import Piece

Item = dict[str, str]  # key, reason, detail


@dataclass(frozen=True)
class Rejected:
    """The rejects of a folder. Those that were there before this run count for nothing: they are tried again."""

    folder: Path
    earlier: dict[str, int]  # file name -> time

    @classmethod
    def before(cls, folder: Path) -> "Rejected":
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
        return read_json(path) or []

    def all(self) -> dict[str, Item]:
        """By key, those of earlier runs too: what was made since is no matter to who asks."""
        return {item["key"]: item for path in self.files(self.folder) for item in read_json(path) or ()}

    def write(self, piece: Piece, items: Sequence[Item]) -> None:
        """Say what of a piece cannot be made."""
        write_json(self._path(piece), list(items))

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"rejected-{piece.name}.json"
