"""Rows of text files, and sentences that name file and line."""

import csv
import gzip
import json

import pytest

from lightning_plugins.data.text_files import read_rows

PAIRS = [
    {"source": "one", "target": "eins"},
    {"source": 'a "quoted", text', "target": "两 字"},
    {"source": "é\u2028x", "target": "\u2014"},  # a line separator of Unicode is text
]


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(content)
    return path


def rows(*arguments):
    return [row.values for row in read_rows(*arguments)]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_the_same_rows(tmp_path, end, newline, mark):
    jsonl = newline.join(json.dumps(pair, ensure_ascii=pair is PAIRS[0]) for pair in PAIRS)
    tsv = newline.join("\t".join(fields) for fields in (PAIRS[0], *(pair.values() for pair in PAIRS)))
    for ending, content in ((".jsonl", f"{jsonl}{newline}{newline}"), (".tsv", tsv)):
        assert rows(write(tmp_path / f"pairs{ending}{end}", mark + content)) == PAIRS
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, PAIRS[0], lineterminator=newline)  # the standard library's own
        writer.writeheader()
        writer.writerows(PAIRS)
    assert rows(write(tmp_path / f"same.csv{end}", mark.encode() + path.read_bytes())) == PAIRS


def test_columns_name_those_of_a_table_without_header(tmp_path):
    path = write(tmp_path / "titles.tsv", "to title\t摘要\t题目\nto title\tb\tt\n")
    assert rows(path, ["prompt", "abstract", "title"])[0] == {"prompt": "to title", "abstract": "摘要", "title": "题目"}
    assert len(rows(path, ["prompt", "abstract", "title"])) == 2
    with pytest.raises(ValueError, match=r"titles.tsv, line 1, names the columns already: leave out columns=\["):
        rows(write(tmp_path / "titles.tsv", "source\ttarget\na\tb\n"), ["source", "target"])


def test_quoted_fields_of_csv_hold_line_ends_and_places_are_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'source,target\n"two\nlines",x\n\nlong,"' + "y" * 200_000 + '"\n')
    found = list(read_rows(path))
    assert [row.values["source"] for row in found] == ["two\nlines", "long"]
    assert [row.place for row in found] == [f"{path}, line 3", f"{path}, line 5"]
    assert len(found[1].values["target"]) == 200_000


def test_documents_of_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", "\none\ntwo\n\n \nthree")
    assert [(row.values["text"], row.place) for row in read_rows(path)] == [
        ("one\ntwo", f"{path}, line 2"),
        ("three", f"{path}, line 6"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"source": "x"}\n{"source": "\xe9"}\n', "line 2, is not UTF-8: byte 0xe9 at place 12."),
        ("a.jsonl", '{"source": 1}\n{"source"}\n', "line 2, is not JSON: Expecting ':' delimiter at column 10."),
        ("a.jsonl", '["x", "y"]\n', 'line 1, must be an object such as {"source": ..., "target": ...}, not \'["x",'),
        ("a.tsv", "source\ttarget\nx\ty\nx\n", "line 3, has 1 fields, but there are 2 columns: source, target."),
        ("a.tsv", b"source\ttarget\nx\t\xff\n", "line 2, is not UTF-8: byte 0xff at place 2."),
        ("a.tsv.gz", b"source\ttarget\nx\t\xff\n", "line 2, is not UTF-8"),
        ("a.tsv", "source\tsource\n", "line 1: two columns have the same name: source, source."),
        ("a.csv", "source,target\n1,2,3\n", "line 2, has 3 fields, but there are 2 columns: source, target."),
        ("a.csv", 'source,target\n"x"y,2\n', "line 2, is not CSV: ',' expected after '\"'."),
        ("a.csv", 'source,target\nx,"y\n', "line 2, is not CSV: unexpected end of data."),
        ("a.jsonl", '{"n": 1}\n{"n": ' + "1" * 5001 + "}\n", "line 2, cannot be read: Exceeds the limit (4300 digits)"),
        ("a.jsonl", '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1, is nested too deeply to be read: flatten"),
        ("a.jsonl", '{"source": NaN}', "line 1, cannot be read: NaN is no value of JSON. Write it as a text."),
        ("a.jsonl", '{"source": -Infinity}', "line 1, cannot be read: -Infinity is no value of JSON."),
        ("a.jsonl", b"\xff\xfe{\x00", "line 1, is not UTF-8: byte 0xff at place 0."),
    ],
)
def test_what_cannot_be_read_is_a_sentence_with_file_and_line(tmp_path, name, content, sentence):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        rows(path)
    assert str(error.value).startswith(f"{path}, {sentence}")


def test_files_that_are_not_what_they_are_called(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json has none of the endings \.jsonl, \.tsv, \.csv, \.txt"):
        rows(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"The file '.*a\.jsonl' does not exist\."):
        rows(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"columns=\['a'\] names the columns of a \.tsv or \.csv file, which"):
        rows(write(tmp_path / "a.jsonl", "{}"), ["a"])
    with pytest.raises(ValueError, match=r"columns=\['a', 'a'\]: two columns have the same name"):
        rows(write(tmp_path / "a.tsv", "1\t2"), ["a", "a"])
    plain = tmp_path / "b.tsv.gz"
    plain.write_bytes(b"source\ttarget\n")
    with pytest.raises(ValueError, match=r"b\.tsv\.gz is no gzip file; if it is not compressed, drop the \.gz\."):
        rows(plain)
    whole = write(tmp_path / "c.tsv.gz", "".join(f"{n}\t{n * n}\n" for n in range(2, 1000)))
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"c\.tsv\.gz, line \d+: the file is truncated or damaged after it\."):
        rows(whole)
