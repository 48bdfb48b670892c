"""Change the index of a table as its own writer would, hashes included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pusa.data.reader import Table
from pusa.data.schema import KEY_COLUMNS
from pusa.data.writer import INDEX, save_index, write_index


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Call `edit` with the content of an index, and write what it made of it."""
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    save_index(folder, index["parts"], index["facts"])


def list_again(table: Table, **replaced: list[Path]) -> None:
    """Write the index of a table whose files were changed; `replaced` are the new files of parts."""
    paths = {part: [table.folder / shard["name"] for shard in shards] for part, shards in table.parts.items()}
    write_index(
        table.folder, {**paths, **replaced}, table.facts, hashed=[part for part in KEY_COLUMNS if part in paths]
    )
