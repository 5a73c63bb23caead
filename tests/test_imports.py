"""The plan of the house: which file may import which. Read from the syntax trees, so imports inside functions count."""
import ast
import os

import pytest
from conftest import ROOT

FILES = sorted(name.removesuffix(".py") for name in os.listdir(ROOT) if name.endswith(".py"))
STAGES = ["pretrain", "sft", "reward", "ppo", "dpo"]
FOLDERS = ["recipes", "tools", "tests", "config", "runs"]


def imports_of(path):
    """Return the dotted names that a file imports anywhere in it."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            # a name made at run time counts by what stands in it
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            names.update(word.strip(".") for word in words if isinstance(word, str))
    return names


def project_imports(name):
    """Return the files of the project that file `name` ("sft", "recipes.poems") imports."""
    path = os.path.join(ROOT, *name.split(".")) + ".py"
    found = set()
    for imported in imports_of(path):
        first = imported.split(".")[0]
        if first in FILES:
            found.add(first)
        elif first in FOLDERS:
            found.add(".".join(imported.split(".")[:2]))
    return found


def test_the_test_sees_imports(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import os.path\nfrom data import collate\n\n\ndef f():\n    from recipes import poems\n"
                    "    import loss\n    return importlib.import_module('recipes.' + name)\n")
    assert imports_of(path) == {"os.path", "data", "data.collate", "recipes", "recipes.poems", "loss"}
    assert {"common", "data", "loss", "model"} <= project_imports("pretrain")


def test_the_top_level_has_sixteen_files():
    assert len(FILES) <= 16, FILES
    assert set(STAGES) <= set(FILES)


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage):
    assert not project_imports(stage) & set(STAGES)


@pytest.mark.parametrize("room", ["model", "loss", "data", "common", "generate", "configurator", "tokenizer", "lora"])
def test_no_room_imports_a_stage(room):
    assert not project_imports(room) & set(STAGES)


def test_the_model_imports_nothing_of_ours():
    assert project_imports("model") == set()


@pytest.mark.parametrize("name", FILES)
def test_nothing_at_the_top_imports_tools_or_tests(name):
    assert not [other for other in project_imports(name) if other.split(".")[0] in ("tools", "tests", "config", "runs")]


def test_there_is_no_circle():
    """Follow the imports from every file, recipes and tools as well; none may come back to where it began."""
    names = list(FILES)
    for folder in ("recipes", "tools"):
        for file in os.listdir(os.path.join(ROOT, folder)):
            if file.endswith(".py") and file != "__init__.py":
                names.append(f"{folder}.{file.removesuffix('.py')}")
    graph = {name: project_imports(name) & set(names) for name in names}

    def follow(name, path):
        assert name not in path, "circle: " + " -> ".join([*path[path.index(name):], name])
        if name in finished:
            return
        for other in sorted(graph[name]):
            follow(other, [*path, name])
        finished.add(name)

    finished = set()
    for name in names:
        follow(name, [])
    assert finished == set(names)
