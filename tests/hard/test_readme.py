"""
What README.md, README_zh.md and docs/ say is true of the tree: line counts, links, commands, settings, names of tests.

    python tests/hard/test_readme.py --fix   # writes today's line counts and line numbers into both READMEs, and where the
                                             # tests that docs/faults.md names lie today
"""
import ast
import functools
import glob
import importlib
import inspect
import os
import re
import shlex
import sys

ROOT = os.path.abspath(f"{__file__}/../../..")
READMES = ("README.md", "README_zh.md")
PAGES = ("gpu", "results", "results_rl", "elsewhere", "faults")  # in both languages
MIRRORS = [READMES, *((f"docs/{name}.md", f"docs/{name}_zh.md") for name in PAGES)]

ROW = re.compile(r"\[`(?P<file>[\w/.]+)`\]\((?P=file)\) \| (?P<lines>\d+) \|")             # of a table of files
DEFINITION = re.compile(r"\[`(?P<name>\w+)`\]\((?P<file>[\w/]+\.py)#L(?P<line>\d+)\)")     # a link to a function or class
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
HEADING = re.compile(r"^(#+) (.+)$", flags=re.M)


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def relative(paths):
    return sorted(os.path.relpath(path, ROOT).replace(os.sep, "/") for path in paths)


DOCUMENTS = [*READMES, *relative(glob.glob(f"{ROOT}/docs/*.md"))]
FOLDERS = ("", "common/", "readers/", "recipes/", "tools/", "learn/")
PROGRAMS = relative([path for folder in FOLDERS for path in glob.glob(f"{ROOT}/{folder}*.py")])
CONFIGS = relative(glob.glob(f"{ROOT}/config/**/*.py", recursive=True))


# ---------------------------------------------------------------------------- line counts and line numbers


def count_lines(path):
    """Return the number of lines, 0 where there is no such file."""
    return read(path).count("\n") if os.path.isfile(os.path.join(ROOT, path)) else 0


def line_of(name, path):
    """Return the line in which a file defines a function or class at its top level."""
    text = read(path) if os.path.isfile(os.path.join(ROOT, path)) else ""
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return node.lineno
    return 0  # it is gone, or has another name now


def with_todays_numbers(text):
    """Return the text with the line counts and line numbers of today."""
    text = ROW.sub(lambda m: f"[`{m['file']}`]({m['file']}) | {count_lines(m['file'])} |", text)
    return DEFINITION.sub(lambda m: f"[`{m['name']}`]({m['file']}#L{line_of(m['name'], m['file'])})", text)


def where_tests_are():
    """Return {name of a test: its file, as docs/faults.md names it}."""
    found = {}
    for path in relative(glob.glob(f"{ROOT}/tests/**/test_*.py", recursive=True)):
        for name in re.findall(r"^def (test_\w+)\(", read(path), flags=re.M):
            found[name] = path.removeprefix("tests/")
    return found


NAMED_TEST = re.compile(r"`(?P<file>(?:hard/)?test_\w+\.py)::(?P<name>test_\w+)`")


def with_todays_tests(text):
    files = where_tests_are()
    return NAMED_TEST.sub(lambda m: f"`{files.get(m['name'], m['file'])}::{m['name']}`", text)


def fix():
    for path in (*READMES, "docs/faults.md", "docs/faults_zh.md"):
        text = read(path)
        fixed = with_todays_tests(with_todays_numbers(text))
        n_changed = sum(a != b for a, b in zip(text.split("\n"), fixed.split("\n")))
        with open(os.path.join(ROOT, path), "w", encoding="utf-8") as f:
            f.write(fixed)
        print(f"{path}: {n_changed} lines changed")
        for m in DEFINITION.finditer(fixed):
            if m["line"] == "0":
                print(f"  {m['file']} defines no {m['name']}: mend the link by hand")


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    fix()
    sys.exit()

import pytest  # noqa: E402 - below, so that --fix needs nothing installed

import configurator  # noqa: E402
from model import ModelConfig  # noqa: E402


@pytest.mark.parametrize("readme", READMES)
def test_line_counts_and_line_numbers(readme):
    text = read(readme)
    wrong = []
    for was, now in zip(text.split("\n"), with_todays_numbers(text).split("\n"), strict=True):
        if was != now:
            wrong.append(now[:60])
    assert not wrong, f"other numbers today (python tests/hard/test_readme.py --fix): {wrong}"
    assert "#L0)" not in text, "a link to a function or class that is not there"


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_short_and_names_every_script(readme):
    assert count_lines(readme) <= 200
    order = [m["file"] for m in ROW.finditer(read(readme))]
    assert order[:2] == ["model.py", "pretrain.py"]
    assert sorted(order) == [path for path in PROGRAMS if "/" not in path]
    for path in PROGRAMS:
        assert not path.startswith("common/") or path.endswith("__init__.py") or f"({path})" in read(readme)


# ---------------------------------------------------------------------------- two languages, one text


def prose(text):
    """The text without its code blocks, in which # is no heading and [ ]( ) no link."""
    return FENCE.sub("", text)


def headings(path):
    """Return [(depth, title)]."""
    return [(len(m[1]), m[2]) for m in HEADING.finditer(prose(read(path)))]


def slug(title):
    """The anchor that GitHub gives a heading."""
    title = re.sub(r"[`*]", "", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


def blocks(path):
    """Return [(language, code without comments)]."""
    found = []
    for m in FENCE.finditer(read(path)):
        lines = [re.sub(r"(^|\s+)# .*", "", line) for line in m[2].split("\n")]
        found.append((m[1], "\n".join(lines)))
    return found


def links(path):
    """Return all targets, a heading of the document itself by its number."""
    own = {f"#{slug(title)}": number for number, (_, title) in enumerate(headings(path))}
    return [own.get(target, target) for target in LINK.findall(prose(read(path)))]


def numbers(text):
    return set(re.findall(r"\d(?:[\d.,]*\d)?", text))


def tables(path):
    """Return the numbers in each row of each table; a sentence may name them in another order."""
    found = []
    inside = False
    for line in prose(read(path)).split("\n"):
        if line.startswith("|") and not inside:
            found.append([])
        inside = line.startswith("|")
        if inside:
            found[-1].append(sorted(numbers(line)))
    return found


@pytest.mark.parametrize("english, chinese", MIRRORS)
def test_both_languages_have_the_same_sections_and_code(english, chinese):
    assert [depth for depth, _ in headings(english)] == [depth for depth, _ in headings(chinese)]
    ours, theirs = blocks(english), blocks(chinese)
    assert ours == theirs


@pytest.mark.parametrize("english, chinese", MIRRORS)
def test_both_languages_have_the_same_numbers_in_tables(english, chinese):
    assert tables(english) == tables(chinese)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_anchors_exist(document):
    for target in LINK.findall(prose(read(document))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(document), path)) if path else document
        assert os.path.exists(os.path.join(ROOT, path)), f"{document} links to {path}, which is not there"
        if anchor and path.endswith(".md"):
            assert anchor in [slug(title) for _, title in headings(path)], f"{document}: no heading {target}"
        elif anchor:
            assert DEFINITION.search(f"[`x`]({target})"), f"{document}: {target} is no line of a file"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document):
    named = NAMED_TEST.findall(read(document))
    files = where_tests_are()
    wrong = [f"{file}::{name}" for file, name in named if files.get(name) != file]
    assert not wrong, f"not there (python tests/hard/test_readme.py --fix): {wrong}"
    assert named or "faults" not in document


# ---------------------------------------------------------------------------- commands


def commands(text):
    """Return the commands in shell text that run something of ours: ["pretrain.py", "config/baby.py", …]."""
    found = []
    for line in text.replace("\\\n", " ").split("\n"):
        for part in re.split(r"&&|\|\||;|\s\|\s|\s>\s", line):
            m = re.search(r"(?:^|\s)(?:\S*/)?(?:python3?|torchrun|bash)\s.*", part)
            if m:
                words = shlex.split(m[0].split("   (")[0], comments=True)[1:]  # "(2 minutes)" is a remark
                found.append([word for word in words if "$" not in word])
    return [command for command in map(ours, found) if command]


def ours(words):
    """Cut off what belongs to torchrun and python; None where no file of ours is run."""
    for i, word in enumerate(words):
        if word == "-m":
            module = words[i + 1]
            is_ours = module.split(".")[0] in ("tools", "recipes", "learn")
            return [module.replace(".", "/") + ".py", *words[i + 2:]] if is_ours else None
        if word.endswith((".py", ".sh")):
            return words[i:]
        if not word.startswith("--"):
            return None
    return None


def commands_of(path):
    """All commands that a file tells people to run."""
    text = read(path)
    if path.endswith(".md"):
        code = [m[2] for m in FENCE.finditer(text) if m[1] == "bash"]
        return commands("\n".join(code + re.findall(r"`([^`\n]+)`", prose(text))))
    if path.startswith("config/"):
        return commands("\n".join(line.lstrip("# ").strip("`") for line in text.split("\n") if line.startswith("#")))
    if path.endswith(".py"):
        lines = (ast.get_docstring(ast.parse(text)) or "").split("\n")
        return commands("\n".join(line for line in lines if re.match(r" +(python|torchrun|bash) ", line)))
    lines = text.replace("\\\n", " ").split("\n")
    return commands("\n".join(line for line in lines if not line.lstrip().startswith(("#", "say", "[", "echo"))))


def has_config(path):
    return any(getattr(node, "name", None) == "Config" for node in ast.parse(read(path)).body)


def import_program(path):
    """Return the module; skips where a package that it needs is missing."""
    try:
        return importlib.import_module(path.removesuffix(".py").replace("/", "."))
    except SystemExit as error:
        pytest.skip(str(error))


def positional_of(path):
    """Return the field that a bare word fills: run(main, Config, positional="name")."""
    found = re.search(r'^    run\(main, Config(?:, positional="(\w+)")?\)', read(path), flags=re.M)
    return found[1] if found else None


def check_command(words, where):
    path = words[0]
    assert os.path.isfile(os.path.join(ROOT, path)), f"{where}: {' '.join(words)}: no file {path}"
    if path.endswith(".sh") or not has_config(path):
        return
    words = [re.sub("^--from=", "--from_=", word) for word in words[1:]]
    if words == ["--help"]:
        return
    try:
        configurator.load_config(import_program(path).Config, words, positional_of(path))
    except SystemExit as error:
        raise AssertionError(f"{where}: python {path} {' '.join(words)}: {error}") from None


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS, *PROGRAMS, *relative(glob.glob(f"{ROOT}/runs/*.sh"))])
def test_commands_name_files_and_settings_that_exist(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands_of(document)
    for words in found:
        check_command(words, document)
    assert len(found) > 10 or document not in READMES
    assert found or document not in CONFIGS


def test_the_test_sees_commands():
    text = "pip install x\nA=1 torchrun --standalone --nproc_per_node=4 sft.py a.py --lr=1 # why\n.venv/bin/python -m tools.plot \\\n out | cat"
    assert commands(text) == [["sft.py", "a.py", "--lr=1"], ["tools/plot.py", "out"]]
    assert commands("python3 -m venv .venv && bash runs/test.sh -x > log") == [["runs/test.sh", "-x"]]
    assert commands("torchrun --shutdown_timeout=300 …\npython main.py   (2 minutes)") == [["main.py"]]
    with pytest.raises(AssertionError, match="no setting 'lrr'"):
        check_command(["sft.py", "--lrr=1"], "here")
    with pytest.raises(AssertionError, match="no file"):
        check_command(["plot.py"], "here")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_in_python_can_be_parsed(document):
    for m in FENCE.finditer(read(document)):
        if m[1] == "python":
            ast.parse(m[2])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_belongs_to_the_script_that_its_comment_names(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = {words[0] for words in commands_of(config) if config in words}
    assert scripts, f"{config} does not say which script it is for"
    for script in scripts:
        check_command([script, config], config)


@pytest.mark.parametrize("path", [path for path in PROGRAMS if has_config(path)])
def test_help_shows_every_setting(path):
    module = import_program(path)
    text = configurator.help_text(module.Config, positional_of(path))
    assert text.startswith(module.__doc__.strip())
    for name in inspect.signature(module.Config).parameters:
        assert re.search(rf"^ +--{name}: ", text, flags=re.M), f"python {path} --help does not show {name}"


# ---------------------------------------------------------------------------- settings


@functools.cache
def definitions(path):
    """Return ({name: tree} of what a file defines at its top level, {name: (file, name there)} of what it imports)."""
    own = {}
    imported = {}
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "Config":
            own[node.name] = node
        elif isinstance(node, ast.Assign):
            own[ast.unparse(node.targets[0])] = node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                file = node.module.replace(".", "/") + ".py"
                module = f"{node.module.replace('.', '/')}/{alias.name}.py"
                target = (module, None) if module in PROGRAMS else (file, alias.name)
                imported[alias.asname or alias.name] = target
    return own, imported


def settings_used(path):
    """Return the names X of all cfg.X that can be reached from a file's own functions, also through what they import."""
    used = set()
    seen = set()
    own, _ = definitions(path)
    waiting = [(path, name) for name in own]
    while waiting:
        place = waiting.pop()
        file, name = place
        if place in seen or file not in PROGRAMS:
            continue
        seen.add(place)
        own, imported = definitions(file)
        for node in ast.walk(own[name]) if name in own else ():
            if isinstance(node, ast.Attribute):
                whose = ast.unparse(node.value)
                if whose == "cfg" or whose.endswith(".cfg"):
                    used.add(node.attr)
                elif imported.get(whose, (None, 0))[1] is None:
                    waiting.append((imported.get(whose, ("", 0))[0], node.attr))
            elif isinstance(node, ast.ImportFrom):  # inside a function
                waiting += [(f"{node.module.replace('.', '/')}.py", alias.name) for alias in node.names]
            elif isinstance(node, ast.Name):
                waiting.append(imported.get(node.id, (file, node.id)))
            elif isinstance(node, ast.Call):
                # getattr(cfg, "x"), read_names(cfg, "x", …), vars(cfg) of which ModelConfig takes its fields
                words = [ast.unparse(argument) for argument in node.args]
                if "cfg" in words:
                    used.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
                if ast.unparse(node) == "vars(cfg)":
                    used.update(inspect.signature(ModelConfig).parameters)
    return used


@pytest.mark.parametrize("path", [path for path in PROGRAMS if has_config(path)])
def test_every_setting_is_used(path):
    module = import_program(path)
    unused = set(inspect.signature(module.Config).parameters) - settings_used(path)
    assert not unused, f"{path}: no code reads {', '.join(sorted(unused))}"


def test_the_test_sees_unused_settings():
    used = settings_used("reward.py")
    assert {"centre", "warmup_steps", "weight_decay", "dtype", "eval_prompts"} <= used
    assert not {"learning_rate", "ppo_epochs", "group_size"} & used
