"""What tells one corpus from another without reading all of it."""

from pathlib import Path

from pipeline.launch.corpora import identity_of
from pipeline.stage import Stage


def test_an_edit_that_keeps_the_size_makes_a_folder_another(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("Call 555-0199 today. " * 5000)
    stage = Stage(name="extract", run="x:y", job="data", width="one", inputs={"books": ("data:books",)})
    before = identity_of(folder)
    record = stage.record({}, {"books": before})
    assert not stage.changes(record, {}, {"books": identity_of(folder)})
    (folder / "b.txt").write_text("Call 000-0000 today. " * 5000)
    assert stage.changes(record, {}, {"books": identity_of(folder)}) == ["file books changed"]
    del before["contents"]  # an older version, or one with very many files, looked at names and sizes
    old = stage.record({}, {"books": before})
    assert not stage.changes(old, {}, {"books": identity_of(folder)})
    (folder / "b.txt").write_text("More. " * 5000)
    assert stage.changes(old, {}, {"books": identity_of(folder)}) == ["file books changed"]
