import json

import pytest

from spa_fast.cil.descriptions.lint import read_descriptions
from spa_fast.cil.errors import RunError


def write(path, classes):
    path.write_text(json.dumps({"dataset": "d", "classes": classes}))
    return path


def entry(name, *lines):
    return {"name": name, "descriptions": list(lines)}


def test_comes_in_the_order_of_names(tmp_path):
    file = write(tmp_path / "d.json", [entry("b", "two", " three "), entry("a", "one", "")])
    assert read_descriptions(file, ["a", "b"]) == [["one"], ["two", "three"]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([entry("a", "x")], "class 'bb' has no descriptions"),
        ([entry("a", "x"), entry("bbb", "x")], r"class 'bb' has no descriptions; did you mean 'bbb'\?"),
        ([entry("a", "x"), entry("bb")], "class 'bb' has no descriptions"),
        ([entry("a", "x"), entry("bb", "  ")], "class 'bb' has no descriptions"),
        ([entry("a", "x"), entry("bb", "x"), entry("c", "x")], "unknown class 'c'"),
        ([entry("a", "x"), entry("a", "y"), entry("bb", "x")], "class 'a' appears twice"),
        ([entry("a", "x"), {"name": "bb"}], r"classes\[1\]"),
        ([entry("a", "x"), entry("bb", 3)], r"classes\[1\]"),
        ("text", "a list 'classes'"),
    ],
)
def test_faults_name_file_and_class(tmp_path, classes, message):
    with pytest.raises(RunError, match=message) as caught:
        read_descriptions(write(tmp_path / "d.json", classes), ["a", "bb"])
    assert "d.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"classes": [], "classes": []}'])
def test_unreadable_files(tmp_path, content):
    file = tmp_path / "d.json"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"--descriptions: .*d\.json"):
        read_descriptions(file, ["a"])
