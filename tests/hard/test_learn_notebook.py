"""learn/mingyue.ipynb from its first cell to its last, in a copy of the project with short settings."""
import os
import shutil
import sys

import pytest
from conftest import ROOT

from learn import exercise


def copy_project(place):
    """Copy the code without data, runs and environments; a few steps for each stage."""
    skipped = shutil.ignore_patterns("data", "out", ".*", "__pycache__", "work", "tests")
    shutil.copytree(ROOT, place, ignore=skipped)
    os.makedirs(place / "tests")
    shutil.copy(exercise.TESTS, place / "tests")
    for name, old, new in (("small.py", "max_steps=400", "max_steps=20"), ("small.py", "max_steps=200", "max_steps=10"),
                           ("small.py", "max_steps=120", "max_steps=3"), ("small.py", "max_steps=40,", "max_steps=3,"),
                           ("small.py", "max_steps=60, batch", "max_steps=2, batch"),
                           ("tiny.py", "steps=360", "steps=8"),
                           ("tiny.py", "steps=100", "steps=4"), ("tiny.py", "steps=80", "steps=2")):
        path = place / "learn" / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} no longer says {old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copy_project(tmp_path / "mingyue")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(os.path.join(ROOT, "learn", "mingyue.ipynb"), as_version=4)
    assert len(notebook.cells) <= 15
    assert not any(cell.get("outputs") for cell in notebook.cells)
    # the cell that is left to the reader gets the right body
    blank = next(cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", ()))
    blank.source = "%%writefile learn/work/rotate.py\nimport torch\n\n\n" + exercise.solution("rotate")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "mingyue")}})
    client.execute()
    said = [str(cell.get("outputs", "")) for cell in notebook.cells]
    assert "平均奖励" in "".join(said) and "接着读" in "".join(said)
    assert "床前明月光" in "".join(said)
    assert "测试都过了" in said[-1]
    assert os.path.getsize(tmp_path / "mingyue" / "out" / "page.html") > 100_000
    assert "Traceback" not in "".join(said) and "error:" not in "".join(said)
