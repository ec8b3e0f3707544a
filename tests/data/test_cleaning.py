"""Files without some of their rows: what the readers of training data find in a copy is the rest, byte for byte."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abr_trainer.data.cleaning import copy_without, has_empty_lines, texts_in
from abr_trainer.data.readers import open_bytes, read_cells, read_files

BREAKS = "one\r\ntwo\rthree\n\n  \nsix é\u2028 and \x85 go on"


def read(path, reader):
    """The rows of a file, as they are read for training."""
    if reader == "csv":
        frames = [frame.fillna("") for frame in read_cells(str(path), 3)]
        return [tuple(row) for frame in frames for row in frame.itertuples(index=False)]
    return list(read_files(reader, [str(path)], streaming=True))


def bytes_of(path):
    with open_bytes(str(path)) as stream:
        return stream.read()


LINES = "".join(json.dumps({"text": f"row {i}", "n": [i, {"é": i}]}, ensure_ascii=i % 2 == 0) + "\n" for i in range(9))
TABLE = (
    'text,"label"\n\nplain,1\n  \n"two\nlines, and a comma",2\n"a ""quoted"" word",3\nin"side,4\n'
    ' "not quoted,5\r\n"",6\n"end",7\nlast,8'
)


def without(text, *parts):
    return "".join(re.split("|".join(map(re.escape, parts)), text))


def pretty(*rows):
    return json.dumps([{"text": f"a, ] b {i}", "more": [i]} for i in rows], indent=2) + "\n"


PRETTY = pretty(*range(5))


@pytest.mark.parametrize(
    ("name", "reader", "content", "numbers", "left"),
    [
        ("notes.txt", "text", BREAKS, {2, 4}, "one\r\nthree\n  \nsix é\u2028 and \x85 go on"),
        ("notes.txt", "text", BREAKS, {1, 6}, "two\rthree\n\n  \n"),
        ("notes.txt", "text", "\ufeffone\ntwo\n", {2}, "\ufeffone\n"),
        ("notes.JSONL", "text", LINES, {1, 9}, "".join(LINES.splitlines(keepends=True)[1:8])),
        ("notes.csv", "csv", TABLE, {2, 4}, without(TABLE, '"two\nlines, and a comma",2\n', 'in"side,4\n')),
        ("notes.csv", "csv", TABLE, {5, 8}, without(TABLE, ' "not quoted,5\r\n', "last,8")),
        ("notes.csv", "csv", '\ufeff"a,\nb",c\n"1\n",2\n3,4\n', {1}, '\ufeff"a,\nb",c\n3,4\n'),
        ("notes.tsv", "csv", 'a\tb\n1,\t"x\ty\n"\n\t\n2\t3\n', {1, 2}, "a\tb\n2\t3\n"),
        ("notes.json", "json", PRETTY, {1, 5}, pretty(1, 2, 3)),
        ("notes.json", "json", PRETTY, {3}, pretty(0, 1, 3, 4)),
        ("notes.json", "json", '[{"text": "é"},{"text": "b"}]', {2}, '[{"text": "é"}]'),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zip"])
def test_what_stays_is_the_same_byte_for_byte_in_every_format(
    tmp_path, name, reader, content, numbers, left, compression
):
    path, out = tmp_path / f"{name}{compression}", tmp_path / f"clean_{name}{compression}"
    if compression == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
    elif compression:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}[compression](content.encode()))
    else:
        path.write_bytes(content.encode())
    before = read(path, reader)
    assert copy_without(path, out, numbers) == len(before)
    assert bytes_of(out) == left.encode()
    assert read(out, reader) == [row for number, row in enumerate(before, 1) if number not in numbers]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, out.name])


def test_tables_of_all_kinds_of_cells_lose_the_rows_that_are_named(tmp_path):
    dice = random.Random(3)
    cells = ["", " ", '"', '""', '"x"', ',"', '",', "a,b", 'a"b', "\n", "\r\n", "x\n\n", "é", "\t", "1"]
    for trial in range(60):
        rows = [[dice.choice(cells) + dice.choice(cells) for _ in range(3)] for _ in range(12)]
        path, out = tmp_path / f"{trial}.csv", tmp_path / f"{trial}_clean.csv"
        pd.DataFrame(rows, columns=["a", "b", "c"]).to_csv(path, index=False)
        numbers = set(dice.sample(range(1, 13), 4))
        before = read(path, "csv")
        assert copy_without(path, out, numbers) == 12
        assert read(out, "csv") == [row for number, row in enumerate(before, 1) if number not in numbers]


def test_parquet_keeps_its_types_its_row_groups_and_its_compression(tmp_path):
    table = pa.table(
        {"text": ["a", None, "c", "d", "e"], "n": pa.array([[1], [], None, [4, 5], [6]], pa.list_(pa.int16()))}
    ).replace_schema_metadata({"kept": "yes"})
    path, out = tmp_path / "rows.parquet", tmp_path / "clean.parquet"
    pq.write_table(table, path, row_group_size=2, compression={"text": "zstd", "n.list.element": "NONE"})
    assert copy_without(path, out, {1, 4}) == 5
    assert pq.read_table(out).equals(pq.read_table(path).take([1, 2, 4]), check_metadata=True)
    before, after = pq.ParquetFile(path), pq.ParquetFile(out)
    assert after.num_row_groups == before.num_row_groups == 3
    kinds = [[file.metadata.row_group(0).column(i).compression for i in (0, 1)] for file in (before, after)]
    assert kinds == [["ZSTD", "UNCOMPRESSED"]] * 2
    assert texts_in(path, {4, 9}) == {4: ["d"]}
    assert copy_without(path, out, {3, 4, 5}) == 5, "all of one group"
    assert pq.read_table(out).equals(pq.read_table(path).take([0, 1]))
    assert copy_without(path, out, {1, 2, 3, 4, 5}) == 5
    assert pq.read_table(out).equals(pq.read_table(path).slice(0, 0))


def test_parquet_is_not_written_into_a_compressed_file(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    with pytest.raises(
        ValueError,
        match=r"clean.parquet.gz: a Parquet file cannot be read from a compressed file. Use the suffix .parquet.",
    ):
        copy_without(path, tmp_path / "clean.parquet.gz", {1})
    assert [each.name for each in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_name_of_the_copy_says_how_it_is_compressed(tmp_path):
    path, out = tmp_path / "rows.jsonl.gz", tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(LINES.encode()))
    copy_without(path, out, {1})
    assert out.read_text() == LINES.partition("\n")[2]
    copy_without(out, tmp_path / "again.jsonl.gz", {1})
    assert gzip.decompress((tmp_path / "again.jsonl.gz").read_bytes()).decode().count("\n") == 7


@pytest.mark.parametrize(
    ("name", "content", "out", "message"),
    [
        ("a.jsonl", LINES, "b.jsonl", r"a.jsonl has changed: row 12 was dropped, but it has only 9 rows"),
        ("a.csv", "t\n1\n2\n", "b.csv", r"a.csv has changed: row 12 was dropped, but it has only 2 rows"),
        ("a.jsonl", LINES, "b.csv", r"b.csv is a copy of a.jsonl, so its name must end in .jsonl"),
        ("a.csv", "t\n1\n", "b.tsv", r"b.tsv is a copy of a.csv, so its name must end in .csv"),
        ("a.json", '{"data": [1]}\n', "b.json", "a.json has changed: row 12 was dropped, but it has only 1 rows"),
        ("a.json", '{\n"data": [1]\n}', "b.json", "a.json contains neither a JSON list of rows nor JSON lines"),
        ("a.json", "[1, 2", "b.json", "a.json is not valid JSON"),
        ("a.json", "[1 2]", "b.json", "character 4 must be a comma or a ]"),
        ("a.txt", "", "b.txt", "a.txt is empty"),
        ("a.csv", 'a,b\n1,"2\n', "b.csv", "a.csv: row 0 has a quote that is not closed|a.csv has changed"),
        ("a.csv", "a,b\n1,2,3\n4,5\n", "b.csv", "a.csv.* row 1 has more cells|a.csv has changed"),
    ],
)
def test_what_cannot_be_copied_is_refused_and_leaves_nothing_behind(tmp_path, name, content, out, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        copy_without(tmp_path / name, tmp_path / out, {1, 12})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_empty_lines_of_json_lines_are_rows_or_are_not(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    path.write_text('{"a": 1}\n\n \n{"a": 2}\n{"a": 3}\n')
    assert copy_without(path, out, {4}) == 5
    assert out.read_text() == '{"a": 1}\n\n \n{"a": 3}\n'
    assert [row["a"] for row in read(path, "json")] == [1, 2, 3], "as a table is read"
    assert copy_without(path, out, {2}, counts_empty_lines=False) == 3
    assert out.read_text() == '{"a": 1}\n\n \n{"a": 3}\n'
    path.write_text('{"a": "1"}\n\n{"a": "2"}\n')
    assert texts_in(path, {2}, counts_empty_lines=False) == {2: ["2"]}
    assert has_empty_lines(path)
    path.write_text('{"a": "1"}\n')
    assert not has_empty_lines(path)


def test_what_stands_in_rows_is_found_by_their_numbers(tmp_path):
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    table.write_text('text\none\n"two\nlines é"\n')
    assert texts_in(table, {2, 3}) == {2: ['"two\nlines é"\n']}
    lines.write_text('{}\n{"text": ["caf\\u00e9\\nau", {"more": "lait"}]}\nno JSON\n')
    assert texts_in(lines, {2, 3}) == {2: ["café\nau", "lait"], 3: ["no JSON\n"]}
