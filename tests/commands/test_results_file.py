"""A file of results knows what is finished, notices another input, and never destroys a file that is not its own."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.commands.results_file import Line, ResultsFile, number_lines

KEY = b"key"
CONTENTS = [f"prompt {i}".encode() for i in range(6)]


def lines(contents: list[bytes] = CONTENTS, key: bytes = KEY) -> list[Line]:
    return list(number_lines(contents, key))


def write(path: Path, indices: list[int], contents: list[bytes] = CONTENTS) -> None:
    with ResultsFile(path) as results:
        for i in indices:
            results.write(lines(contents)[i], {"text": f"answer {i}"})


def left(path: Path, contents: list[bytes] = CONTENTS, key: bytes = KEY) -> list[int]:
    with ResultsFile(path) as results:
        return [line.index for line in results.unfinished(lines(contents, key))]


@given(
    order=st.permutations(range(6)), num_written=st.integers(0, 6), num_torn=st.integers(0, 60), cut=st.integers(1, 80)
)
@settings(max_examples=60, deadline=None)
def test_a_run_goes_on_wherever_the_last_one_was_cut_off(
    order: list[int], num_written: int, num_torn: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    write(path, order[:num_written])
    content = path.read_bytes()[:-cut] if num_torn % 2 else path.read_bytes()
    path.write_bytes(content)
    whole = content[: content.rfind(b"\n") + 1]
    done = [json.loads(line)["index"] for line in whole.splitlines()]
    unfinished = left(path)
    assert sorted(unfinished + done) == list(range(6)) and path.read_bytes() == whole
    write(path, unfinished)
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(6)) and left(path) == []


@pytest.mark.parametrize(
    ("contents", "key"),
    [
        ([b"changed", *CONTENTS[1:]], KEY),
        (CONTENTS[1:], KEY),
        ([b"first", *CONTENTS], KEY),
        (CONTENTS[:2], KEY),
        (CONTENTS, b"other parameters"),
    ],
)
def test_another_input_is_refused(contents: list[bytes], key: bytes, tmp_path: Path) -> None:
    write(tmp_path / "out", [0, 3, 1])
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(ValueError, match="another --output"):
        left(tmp_path / "out", contents, key)
    assert (tmp_path / "out").read_bytes() == before


def test_a_longer_input_with_the_same_beginning_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "out", [0, 3, 1])
    assert left(tmp_path / "out", [*CONTENTS, b"new"]) == [2, 4, 5, 6]


def test_blank_lines_count_and_have_no_results() -> None:
    assert [line.index for line in number_lines([b"\n", b"a\n", b"  \r\n", b"b"], KEY)] == [1, 3]


def test_line_ends_do_not_matter() -> None:
    assert [line.hash for line in number_lines([b"a\r\n", b"a\n", b"a"], KEY)] == [lines([b"a"])[0].hash] * 3


@given(content=st.text(string.printable, min_size=1).filter(lambda text: not text.startswith('{"index": ')))
@settings(max_examples=100, deadline=None)
def test_a_file_of_something_else_stays_as_it_is(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("other") / "file"
    path.write_bytes(content.encode())
    try:
        ResultsFile(path).__exit__()
    except ValueError as error:
        assert "is no result of this command" in str(error)
    else:
        assert '{"index": '.startswith(content)  # a line of ours, torn in its first bytes
        return
    assert path.read_bytes() == content.encode()


@pytest.mark.parametrize(
    "line",
    [
        '{"index": 9000000, "hash": "00"}',
        '{"index": -1, "hash": "00"}',
        '{"index": 0, "hash": "11112222333344445"}',
        '{"index": 0, "hash": "xyz"}',
        '{"index": "0", "hash": "00"}',
        '{"index": 0}',
        "[" * 5000,
    ],
)
def test_a_line_that_no_run_writes_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 0 of .* is no result of this command"):
        ResultsFile(tmp_path / "out")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "out"), pytest.raises(ValueError, match="another process is writing"):
        ResultsFile(tmp_path / "out")
    ResultsFile(tmp_path / "out").__exit__()


def test_errors_of_all_runs_are_counted(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "out") as results:
        results.write(lines()[0], {"error": "no"})
        results.write(lines()[1], {"text": "yes"})
    with ResultsFile(tmp_path / "out") as results:
        results.write(lines()[2], {"error": "no"})
        assert results.num_errors == 2


def test_a_result_is_there_before_the_file_is_closed_and_any_text_is_one_line(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "out") as results:
        for i, text in enumerate(["a\nb\u2028c", "häuser", "half \ud800 character"]):
            results.write(lines()[i], {"text": text})
            assert json.loads((tmp_path / "out").read_bytes().split(b"\n")[i])["text"] == text
    assert "häuser".encode() in (tmp_path / "out").read_bytes()
