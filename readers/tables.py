"""
Tables: .csv, .tsv and .parquet, a record a row.
"""
import csv
import re

from readers.account import Drop, Skip
from readers.calls import without_nulls
from readers.encodings import has_surrogates, open_text, repair
from readers.fields import KNOWN


def read_csv(raw, _):
    csv.field_size_limit(1 << 26)
    f = open_text(raw)

    taken = []  # the bytes of the lines of a row

    def lines():
        for line in f:
            taken.append(len(line.encode(errors="replace")))
            try:
                yield repair(line, f.encoding).replace("\0", "").replace("_x000D_", "")  # Excel's \\r
            except Skip:
                yield line  # a row may have many lines, so it is judged below

    # what separates the names in the header separates the fields, if the first line (of Excel) does not say it: sep=;
    head = f.buffer.peek().decode(f.encoding, "ignore")
    header = re.sub('"[^"]*"', "", head).splitlines() or [""]
    separator = "\t" if "\t" in header[0] else max(",;", key=header[0].count)
    said = re.match(r'\ufeff?"?sep=(.)"?\r?\n', head)
    if said:
        separator = said[1]
        f.readline()
    # in most files with tabs, quotes are no more than that
    is_quoted = separator != "\t" or re.search('(^|\t)"[^"\t]*"(\t|\r|$)', head, re.MULTILINE)
    quoting = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    rows = csv.DictReader(lines(), restkey="more", delimiter=separator, strict=True, quoting=quoting)
    rows.fieldnames = columns(rows.fieldnames or [])
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            if "expected after" not in str(e):
                # a quote that never closes has swallowed all that follows
                raise EOFError(f"{e}: the quote that opens in line {rows.line_num} or before does not close") from e
            detail = f'{e}: a quote inside of a text in quotes must be written twice, ""'
            if len(taken) > 1:
                detail += f"; or one that opens {len(taken) - 1} lines before does not close, and all of them are lost"
            yield rows.line_num, Skip("broken CSV", detail, lost=sum(taken[1:]))
            continue
        if not any(row.values()):
            continue  # Excel goes on with empty rows
        cells = {name: str(value).strip().lower() for name, value in row.items() if value}
        if all(value == name.lower() or len(cells) > 1 and value in KNOWN for name, value in cells.items()):
            yield rows.line_num, Drop("a row of names")  # of another table, or below a title
            continue
        more = row.get("more")
        if isinstance(more, list) and not any(more):
            del row["more"]  # separators at the end of a line
        elif isinstance(more, list):
            n = len(row) - 1
            row = Skip("broken CSV", f"{n + len(more)} fields, but the header names {n}: quotes must stand around a "
                       f"text with {separator!r} in it")
        elif has_surrogates("".join(map(str, row.values()))):
            row = Skip("wrong encoding", f"{row!a:.60}")
        yield rows.line_num, row


def columns(names):
    """The names of the columns of a table, each for one: of two with one name the first would be lost."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(names, 1)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        numbers = [str(number) for number, name in enumerate(names, 1) if name in twice]
        raise Skip("two columns of one name", f"columns {', '.join(numbers)} are named {', '.join(sorted(twice))}: "
                   "give each a name of its own")
    return names


def read_arrow(raw, _):
    """Arrow, as datasets.save_to_disk() and its cache write it: a stream of batches."""
    import pyarrow.ipc
    table = pyarrow.ipc.open_stream(raw)
    yield from rows_in(table.schema, table)


def read_parquet(raw, _):
    import pyarrow.parquet
    table = pyarrow.parquet.ParquetFile(raw)
    yield from rows_in(table.schema_arrow, table.iter_batches(batch_size=256))


def rows_in(schema, batches):
    """The rows of Arrow's batches, one after the other."""
    columns(schema.names)
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", without_nulls(record)
