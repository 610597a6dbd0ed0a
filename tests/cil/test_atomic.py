"""Files that are there whole or not at all."""

import os

import pytest

from spa_fast.cil.atomic import replacing


@pytest.mark.parametrize("earlier", ["old", None])
@pytest.mark.parametrize("full", [False, True], ids=["an error in the block", "a full disk"])
def test_whatever_ends_the_block_an_earlier_file_stays(tmp_path, monkeypatch, earlier, full):
    file = tmp_path / "f.csv"
    if earlier:
        file.write_text(earlier)

    def fails(fd):
        raise OSError(28, "No space left on device")

    if full:
        monkeypatch.setattr("os.fsync", fails)

    def write():
        with replacing(file) as partial:
            partial.write_text("new")
            if not full:
                raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="No space" if full else "Input/output"):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == [earlier] * bool(earlier)


def test_it_is_flushed_before_it_takes_the_name(tmp_path, monkeypatch):
    seen = []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (real(fd), seen.append(sorted(map(str, tmp_path.iterdir())))))
    file = tmp_path / "f.csv"
    with replacing(file) as partial:
        partial.write_text("new")
    assert [len(names) for names in seen] == [1]
    assert str(file) not in seen[0]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
