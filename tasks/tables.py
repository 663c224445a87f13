"""Tables of a few rows, made without pandas: to import it would be a tenth of the time of stripping one scan."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj

Rows = Sequence[Mapping[str, Any]]


def from_rows(rows: Rows, schema: pa.Schema, /) -> pa.Table:
    """`pa.Table.from_pylist` of text, numbers, truth values and bytes.

    Pyarrow imports pandas, where it is installed, at the first value of Python that it converts; it reads JSON without.

    Raises
    ------
    pa.ArrowInvalid : a value is of another type than its column.
    """
    plain = [field for field in schema if field.type != pa.binary()]
    lines = (json.dumps({field.name: row.get(field.name) for field in plain}, default=float) + "\n" for row in rows)
    text = "".join(lines).encode()
    if not text:
        return schema.empty_table()
    whole = pj.ReadOptions(use_threads=False, block_size=len(text))
    read = pj.read_json(pa.BufferReader(text), whole, pj.ParseOptions(explicit_schema=pa.schema(plain)))
    columns = [read[field.name] if field in plain else _bytes(rows, field.name) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _bytes(rows: Rows, name: str) -> pa.Array:
    values = [row.get(name) for row in rows]
    known = np.packbits([value is not None for value in values], bitorder="little")
    parts = [value or b"" for value in values]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    return pa.Array.from_buffers(
        pa.binary(), len(values), [pa.py_buffer(data) for data in (known, ends, b"".join(parts))]
    )
