"""The record of a comparison: one JSON file, to which each row is added as soon as it is there."""

import dataclasses
import json
import pathlib
from typing import Any

from dig_jax.files.atomic import write_json


@dataclasses.dataclass
class Record:
    """Rows by their names, "MODEL SIZE PIXELS PHASE @ DEVICE", each with the versions and date it is of."""

    path: pathlib.Path
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: pathlib.Path) -> "Record":
        """Return the record in a file, or an empty one."""
        return cls(path, json.loads(path.read_text()) if path.exists() else {})

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row and write the file. Another process may have added rows since."""
        self.rows = Record.read(self.path).rows | {name: row}
        write_json(self.path, self.rows)
