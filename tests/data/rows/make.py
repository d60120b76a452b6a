"""Writes the Parquet files of this folder with pyarrow, and beside each the rows as JSON Lines.

    pip install pyarrow && python make.py
"""
import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = ["Hello", "", "Grüße, 世界 🙂", "line\nend \"quoted\" \\ back", "x" * 40]


def conversation(n):
    if n == 4:
        return None
    if n == 5:
        return []
    turns = []
    for turn in range(1 + n % 3):
        turns.append({"role": "user", "content": TEXT[(n + turn) % 5], "name": None})
        turns.append({"role": "assistant", "content": None if n == 7 else TEXT[(n * 2 + turn) % 5], "name": "a" if n == 2 else None})
    return turns


ROWS = [
    {
        "id": f"r{n}",
        "messages": conversation(n),
        "score": None if n == 3 else n / 8,
        "count": n * 1_000_000_007,
        "small": n - 5,
        "flag": None if n == 1 else n % 2 == 0,
        "tags": None if n == 6 else TEXT[: n % 4],
        "grid": [[1, n], [], None] if n % 2 else [],
        "meta": None if n == 8 else {"source": TEXT[n % 5], "inner": {"depth": n, "list": [{"k": n}] * (n % 3)}},
        "pairs": None if n == 9 else {f"k{i}": i for i in range(n % 3)},
        "made": datetime.datetime(2024, 5, 1, 10, 0, n, 250000),
        "day": datetime.date(2024, 5, 1 + n),
    }
    for n in range(10)
]


def schema(text, listed):
    message = pa.struct([("role", text), ("content", text), ("name", text)])
    inner = pa.struct([("depth", pa.int32()), ("list", listed(pa.struct([("k", pa.int8())])))])
    return pa.schema([
        ("id", text),
        ("messages", listed(message)),
        ("score", pa.float64()),
        ("count", pa.int64()),
        ("small", pa.int16()),
        ("flag", pa.bool_()),
        ("tags", listed(text)),
        ("grid", listed(listed(pa.int32()))),
        ("meta", pa.struct([("source", text), ("inner", inner)])),
        ("pairs", pa.map_(pa.string(), pa.int32())),
        ("made", pa.timestamp("us")),
        ("day", pa.date32()),
    ])


def line(row):
    row = dict(row)
    row["made"] = row["made"].strftime("%Y-%m-%d %H:%M:%S.%f +00:00")
    row["day"] = row["day"].isoformat()
    return json.dumps(row, ensure_ascii=False)


plain = pa.Table.from_pylist(ROWS, schema=schema(pa.string(), pa.list_))
large = pa.Table.from_pylist(ROWS, schema=schema(pa.large_string(), pa.large_list))
pq.write_table(plain, "snappy.parquet", row_group_size=4)
pq.write_table(plain, "gzip.parquet", compression="gzip", use_dictionary=False, row_group_size=3)
pq.write_table(plain, "zstd.parquet", compression="zstd", data_page_version="2.0")
pq.write_table(plain, "brotli.parquet", compression="brotli", version="1.0")
pq.write_table(plain, "lz4.parquet", compression="lz4", data_page_size=64, write_batch_size=2)
pq.write_table(large, "none.parquet", compression="none", column_encoding={"id": "DELTA_BYTE_ARRAY", "count": "DELTA_BINARY_PACKED"}, use_dictionary=False)
with open("rows.jsonl", "w", encoding="utf-8") as out:
    out.writelines(line(row) + "\n" for row in ROWS)

one = {"messages": [{"role": "user", "content": "x"}]}
for name, value, kind in [
    ("bytes", b"\xff\x00", pa.binary()),
    ("decimal", decimal.Decimal("1.50"), pa.decimal128(5, 2)),
    ("nanoseconds", 1, pa.timestamp("ns")),
]:
    table = pa.table({"messages": [one["messages"]], "extra": pa.array([{"inner": value}], pa.struct([("inner", kind)]))})
    pq.write_table(table, f"{name}.parquet")
pq.write_table(plain.slice(0, 0), "empty.parquet")
