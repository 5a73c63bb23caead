"""The plan of the house: which file may import which, how long a file may be. Read from the syntax trees, so that
imports inside functions count."""
import ast
import glob
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from small_runs import STAGES

HOUSE = ("common", "readers", "recipes", "tools", "learn")


def files(*folders):
    """Dotted names of the files at the top level ("") or in folders of the project."""
    paths = [path for folder in folders for path in glob.glob(os.path.join(ROOT, folder, "*.py"))]
    names = [os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".") for path in paths]
    return sorted(name for name in names if not name.endswith("__init__"))


TOP = files("")
ROOMS = files("common")
ALL = files("", *HOUSE)


def source(name):
    with open(os.path.join(ROOT, *name.split(".")) + ".py", encoding="utf-8") as f:
        return f.read()


def imports_of(text):
    """Return the dotted names that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert not [alias for alias in node.names if alias.name == "*"]
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            # a name made at run time counts by what stands in it
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            names.update(word.strip(".") for word in words if isinstance(word, str))
    return names


def project_imports(name):
    """Return the files (and, where a name is made at run time, folders) of the project that file `name` imports."""
    return {imported for imported in imports_of(source(name)) if imported in ALL or imported in HOUSE}


def test_the_test_sees_imports():
    text = "import os.path\nfrom common.data import pad\n\n\n" \
           "def f():\n    from recipes import poems\n    import model\n    return importlib.import_module('recipes.' + name)\n"
    assert imports_of(text) == {"os.path", "common.data", "common.data.pad", "recipes", "recipes.poems", "model"}
    assert {"common.data", "common.loss", "model"} <= project_imports("pretrain")


def test_a_newcomer_first_sees_eleven_files():
    assert TOP == sorted(["model", "tokenizer", "prepare", *STAGES, "sample", "configurator"])


@pytest.mark.parametrize("name", [*TOP, *ROOMS])
def test_who_may_import_whom(name):
    """No stage imports another, no room a stage, the model nothing of ours, and nothing here a tool, a test or a
    config."""
    found = project_imports(name)
    assert not found & set(STAGES)
    assert name != "model" or not found
    assert not [other for other in found if other.split(".")[0] in ("tools", "learn", "tests", "config", "runs")]


def test_there_is_no_circle():
    """Follow the imports from every file; none may come back to where it began."""
    graph = {name: project_imports(name) & set(ALL) for name in ALL}

    def follow(name, path):
        assert name not in path, "circle: " + " -> ".join([*path[path.index(name):], name])
        if name in finished:
            return
        for other in sorted(graph[name]):
            follow(other, [*path, name])
        finished.add(name)

    finished = set()
    for name in ALL:
        follow(name, [])


@pytest.mark.parametrize("name", [*TOP, *ROOMS])
def test_a_file_can_be_read_in_one_sitting(name):
    lines = source(name).count("\n")
    assert lines <= (500 if name == "model" else 350)


def test_importing_has_no_side_effects():
    """Nothing is printed, started, caught or written when a file is imported."""
    code = ("import signal, torch\nbefore = signal.getsignal(signal.SIGTERM), torch.get_num_threads()\n"
            f"import {', '.join([*TOP, *ROOMS])}\n"
            "assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before\n"
            "assert not torch.distributed.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
