"""Columns of Arrow data, in the batches in which Parquet and Arrow files are read; one document per
row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lm.mapping import UserError, nearest
from lm.readers import Asked, File, Row, package


def arrow(file: File) -> Any:
    """The pyarrow package, which reads `file`.

    Raises:
      UserError: it is not installed.
    """
    return package("pyarrow", f"{file.path} is read by pyarrow")


def wanted(schema: Any, file: File, asked: Asked) -> list[str]:
    """The columns to read: that of the text and, if it can name documents, `id`. Empty if no rows
    are needed.

    Raises:
      UserError: there is no such column, or it does not hold text.
    """
    text_key, name, types = asked.text_key, asked.source, arrow(file).types
    if text_key not in schema.names:
        raise UserError(
            f"{file.path} has no column data.sources.{name}.text_key={text_key!r}; "
            f"{nearest(text_key, schema.names)}"
        )
    has_ids = "id" in schema.names and text_key != "id"
    for column in (text_key, "id") if has_ids else (text_key,):
        if schema.names.count(column) > 1:
            raise UserError(
                f"{file.path} of data.sources.{name} has {schema.names.count(column)} columns "
                f"of the name {column!r}; rename all but one"
            )
    kind = schema.field(text_key).type
    if not (_is_string(kind, types) or _is_binary(kind, types) or types.is_null(kind)):
        raise UserError(
            f"{file.path}: column text_key={text_key!r} holds {kind}; it must hold strings"
        )
    has_ids = has_ids and _is_id(schema.field("id").type, types)
    return [*([] if asked.only_ids else [text_key]), *(["id"] if has_ids else [])]


def rows(
    batches: Iterable[Any],
    columns: list[str],
    file: File,
    asked: Asked,
    end: Callable[[int], int],
) -> Iterator[Row]:
    """The rows of batches; `end(n)` is how far the reader is in the file after n of them."""
    number, pyarrow = 0, arrow(file)
    for batch in batches:
        found = {name: batch.column(name) for name in columns}
        texts = None if asked.only_ids else _binary(found[asked.text_key], pyarrow)
        ids = _ids(found["id"], pyarrow) if "id" in columns else [None] * batch.num_rows
        for i, identity in enumerate(ids):
            number += 1
            data = None if texts is None else texts[i].as_buffer()
            place = f"{file.path}: row {number}"
            row = Row(f"{file.name}:{number}", memoryview(data or b""), end(number), place)
            row = row.with_id(identity)
            if row.has_id or not asked.only_ids:
                yield row


def _is_string(kind: Any, types: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: Any, types: Any) -> bool:
    """Whether a column is bytes: text that some writers do not declare as UTF-8."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_id(kind: Any, types: Any) -> bool:
    """Whether a column can name documents. Others, such as times, are not read: some of their
    values have no Python type."""
    return _is_string(kind, types) or types.is_integer(kind)


def _binary(column: Any, pyarrow: Any) -> Any:
    """The bytes of a text column; this does not check that they are UTF-8."""
    if pyarrow.types.is_dictionary(column.type):  # pyarrow cannot decode one of views
        values = column.dictionary.cast(pyarrow.large_binary())
        column = pyarrow.DictionaryArray.from_arrays(column.indices, values)
    return column.cast(pyarrow.large_binary())


def _ids(column: Any, pyarrow: Any) -> list[Any]:
    """The ids. Strings that are not UTF-8 get lone surrogates, as Python's file names do."""
    if not _is_string(column.type, pyarrow.types):
        return column.to_pylist()
    found = _binary(column, pyarrow).to_pylist()
    return [None if x is None else x.decode("utf-8", "surrogateescape") for x in found]
