"""The text column of a parquet file, read in bounded memory however large its row groups are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from data_prep.errors import DepthpipeError

# Without a buffer of its own pyarrow reads the whole column of a row group first: all of the file, as most writers
# put a million rows into one.
BUFFER_BYTES = 1 << 20
BATCH_BYTES = 1 << 22
BATCH_ROWS = 256


class DamagedRows(Exception):
    """A row group ends early or does not decode."""


class RowGroup(NamedTuple):
    """Rows of a row group, and bytes of its text as encoded before compression."""

    rows: int
    text_bytes: int


class TextColumn:
    """The column `name` of the file `path`: its row groups, and the values of each in order."""

    def __init__(self, path: str, name: str) -> None:
        """Raises DepthpipeError without pyarrow or such a column, DamagedRows when the file cannot be opened."""
        try:
            from pyarrow import parquet
        except ImportError:
            raise DepthpipeError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
        try:
            self._file = parquet.ParquetFile(
                path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (_arrow_error(), OSError, UnicodeDecodeError) as error:  # the last for names in a damaged footer
            raise DamagedRows(f"not a readable parquet file ({_first_line(error)})") from None
        names = self._file.schema_arrow.names
        if name not in names:
            raise DepthpipeError(f"{path}: no column {name!r}: name one of {', '.join(names)} with --text-key")
        self._name = name

    def row_groups(self) -> list[RowGroup]:
        """All row groups of the file, empty ones too."""
        paths = [self._file.schema.column(i).path for i in range(len(self._file.schema))]
        leaves = [i for i, path in enumerate(paths) if path == self._name or path.startswith(f"{self._name}.")]
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        return [
            RowGroup(group.num_rows, sum(group.column(i).total_uncompressed_size for i in leaves)) for group in groups
        ]

    def batches(self, index: int, group: RowGroup) -> Iterator[Any]:
        """The values of row group `index` as pyarrow arrays, cut the same way each time. Raises DamagedRows."""
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(group.text_bytes, 1)))
        read = 0
        try:
            for batch in self._file.iter_batches(rows, [index], [self._name], use_threads=False):
                read += len(batch)
                yield batch.column(0)
        except (_arrow_error(), OSError) as error:
            raise DamagedRows(_first_line(error)) from None
        if read != group.rows:
            raise DamagedRows(f"{read} rows of {group.rows}")


def values(column: Any) -> list[object]:
    """A pyarrow array as Python objects; text that is not UTF-8 as bytes."""
    try:
        objects: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        objects = column.cast("large_binary").to_pylist()
    return objects


def _arrow_error() -> type[Exception]:
    """The root of pyarrow's errors; pyarrow is imported only where parquet is read."""
    from pyarrow import ArrowException

    error: type[Exception] = ArrowException
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
