"""configurator.py: what may be written, what is refused, and in which words."""
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import changed, load_config, parse


@dataclass
class Config:
    # files
    data_dir: str = "data/x"      # folder from prepare.py
    name: str = ""
    # optimizer
    lr: float = 1e-3              # peak learning rate
    max_steps: int = 1000         # steps of the whole run
    batch_size: int = 16
    compile: bool = True          # torch.compile, where it works


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="conf.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


def refused(*argv, positional=None):
    with pytest.raises(ValueError) as error:
        parse(Config, list(argv), positional)
    return str(error.value)


def test_defaults():
    assert parse(Config, []) == Config()
    assert changed(Config()) == {}


@pytest.mark.parametrize("argument, key, value", [
    ("--lr=3e-4", "lr", 3e-4), ("--lr=1", "lr", 1.0), ("--lr=-2", "lr", -2.0), ("--lr=.5", "lr", 0.5),
    ("--lr=inf", "lr", float("inf")), ("--lr=1_000", "lr", 1000.0),
    ("--max_steps=20", "max_steps", 20), ("--max_steps=1e5", "max_steps", 100_000),
    ("--max_steps=20.0", "max_steps", 20), ("--max_steps=-1", "max_steps", -1),
    ("--max_steps=10_000", "max_steps", 10_000), ("--max-steps=7", "max_steps", 7),
    ("--compile=False", "compile", False), ("--compile=false", "compile", False), ("--compile=0", "compile", False),
    ("--compile=True", "compile", True), ("--compile=true", "compile", True), ("--compile=1", "compile", True),
    ("--name=a=b", "name", "a=b"), ("--name==", "name", "="), ("--name=", "name", ""), ("--name=5", "name", "5"),
    ("--name=None", "name", "None"), ("--name= two words ", "name", " two words "), ("--name=床前明月光", "name", "床前明月光"),
    ("--name='quoted'", "name", "'quoted'"), ("--name=--x", "name", "--x"), ("--name=x.py", "name", "x.py"),
])
def test_values_of_the_command_line(argument, key, value):
    cfg = parse(Config, [argument])
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
    assert dataclasses.replace(cfg, **{key: getattr(Config(), key)}) == Config()  # and nothing else changed


@pytest.mark.parametrize("argument, words", [
    ("--lr=fast", "lr wants float, got 'fast' (from command line)"),
    ("--lr=", "lr wants float, got '' (from command line)"),
    ("--lr=True", "lr wants float, got 'True'"),
    ("--lr='1'", "lr wants float"),
    ("--lr=(1,2)", "lr wants float"),
    ("--max_steps=0.5", "max_steps wants int, got '0.5' (from command line)"),
    ("--max_steps=inf", "max_steps wants int, got 'inf'"),
    ("--max_steps=nan", "max_steps wants int, got 'nan'"),
    ("--max_steps=1e-5", "max_steps wants int, got '1e-5'"),
    ("--max_steps=ten", "max_steps wants int, got 'ten'"),
    ("--max_steps=True", "max_steps wants int, got 'True'"),
    ("--max_steps=__import__('os').getcwd()", "max_steps wants int"),
    ("--compile=yes", "compile wants bool, got 'yes' (from command line)"),
    ("--compile=2", "compile wants bool, got '2'"),
    ("--compile=", "compile wants bool, got ''"),
])
def test_wrong_types_name_key_type_value_and_source(argument, words):
    key, value = argument[2:].split("=", 1)
    message = refused(argument)
    assert message.startswith(words) and "(from command line)" in message
    assert (repr(value) in message) or (value in message)


def test_values_of_a_config_file_are_checked_too(config_file):
    for text, words in [("max_steps = 0.5", "max_steps wants int, got 0.5"), ("lr = None", "lr wants float, got None"),
                        ("name = 5", "name wants str, got 5"), ("compile = 'maybe'", "compile wants bool, got 'maybe'"),
                        ("lr = [1]", "lr wants float, got [1]"), ("max_steps = True", "max_steps wants int, got True")]:
        path = config_file(text)
        assert refused(path) == f"{words} (from {path})"
    cfg = parse(Config, [config_file("lr = 1\nmax_steps = 1e5\nbatch_size = 8 * 64\ncompile = False")])
    assert (cfg.lr, cfg.max_steps, cfg.batch_size, cfg.compile) == (1.0, 100_000, 512, False)
    assert type(cfg.lr) is float and type(cfg.max_steps) is int


def test_unknown_keys_get_a_suggestion(config_file):
    assert refused("--learn_rate=1").startswith("no setting 'learn_rate'")
    assert "did you mean 'max_steps'?" in refused("--max_step=1")
    assert "did you mean 'batch_size'?" in refused("--bach-size=1")
    message = refused("--zzz=1")
    assert message.startswith("no setting 'zzz'") and "did you mean" not in message
    assert "command line" in message and "--help" in message
    path = config_file("batchsize = 4")
    message = refused(path)
    assert message.startswith("no setting 'batchsize', did you mean 'batch_size'?") and path in message


def test_words_that_cannot_be_read(tmp_path):
    assert refused("--compile") == "write --compile as --compile=VALUE"
    assert refused("--lr", "3e-4") == "write --lr as --lr=VALUE"
    assert refused("lr=3").startswith("cannot read 'lr=3': settings are --key=value")
    assert refused("-lr=3").startswith("cannot read '-lr=3'")
    missing = str(tmp_path / "none.py")
    message = refused(missing)
    assert missing in message and "does not exist" in message and os.getcwd() in message


def test_a_config_file_may_compute(config_file):
    """Imports, functions, classes and names that begin with an underscore are the file's own business."""
    cfg = parse(Config, [config_file("""
import math
import os.path as p
from math import sqrt, ceil
from pathlib import Path
from functools import partial
_tokens = 1_000_000
_double = lambda x: 2 * x

def steps(tokens):
    return ceil(tokens / batch_size)

class Helper:
    pass

batch_size = 8 * 4
max_steps = steps(_tokens)
lr = sqrt(_double(2)) * 1e-3
""")])
    assert cfg == Config(batch_size=32, max_steps=31250, lr=2e-3)


def test_the_command_line_wins_wherever_it_stands(config_file):
    path = config_file("lr = 0.5\nmax_steps = 5\nname = 'file'")
    for argv in ([path, "--lr=0.1"], ["--lr=0.1", path]):
        assert parse(Config, argv) == Config(lr=0.1, max_steps=5, name="file")
    second = config_file("lr = 0.7", "second.py")
    assert parse(Config, [path, second]).lr == 0.7 and parse(Config, [second, path]).lr == 0.5  # the later file wins
    assert parse(Config, [path, "--lr=0.1", second]).lr == 0.1
    assert parse(Config, ["--lr=1", "--lr=2"]).lr == 2.0


def test_positional(config_file):
    path = config_file("name = 'file'")
    assert parse(Config, ["poems"], "name").name == "poems"
    assert parse(Config, ["--lr=1", "poems"], "name") == Config(lr=1.0, name="poems")
    for argv in ([path, "poems"], ["poems", path]):
        assert parse(Config, argv, "name").name == "poems"
    assert "cannot read 'again'" in refused("poems", "again", positional="name")
    assert "cannot read 'poems'" in refused("poems")


def test_changed_lists_what_differs():
    assert changed(parse(Config, ["--lr=1", "--max_steps=1000", "--compile=0"])) == {"lr": 1.0, "compile": False}


def test_load_config_leaves_with_the_message(capsys):
    with pytest.raises(SystemExit) as error:
        load_config(Config, ["--max_stepz=1"])
    assert str(error.value).startswith("error: no setting 'max_stepz', did you mean 'max_steps'?")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys, flag):
    with pytest.raises(SystemExit) as left:
        load_config(Config, ["--lr=fast", flag])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(__doc__.strip())
    lines = {line.split("=")[0].strip(): line for line in text.splitlines()}
    assert "'data/x'" in lines["--data_dir"] and "str" in lines["--data_dir"]
    assert lines["--data_dir"].endswith("folder from prepare.py")
    assert "=0.001 " in lines["--lr"] and "float" in lines["--lr"] and lines["--lr"].endswith("peak learning rate")
    assert "=1000 " in lines["--max_steps"] and lines["--max_steps"].endswith("steps of the whole run")
    assert "=True " in lines["--compile"] and "bool" in lines["--compile"]
    assert "int" in lines["--batch_size"]
    order = [text.index(word) for word in ("files\n", "--data_dir", "--name", "optimizer\n", "--lr", "--compile")]
    assert order == sorted(order)


def test_a_stage_prints_its_help_and_errors():
    """The real thing, in a process of its own: exit codes, no traceback."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = lambda *argv: subprocess.run([sys.executable, "pretrain.py", *argv], cwd=root, capture_output=True, text=True)
    wrong = run("--learning_rate=1")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: no setting 'learning_rate'")
    assert "Traceback" not in wrong.stderr
    import pretrain
    from configurator import help_text
    text = help_text(pretrain.Config)
    for field in dataclasses.fields(pretrain.Config):
        assert f"--{field.name}={field.default!r}" in text
    assert "torchrun" in text and "micro-steps in a step, all processes together" in text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False), st.integers(-10**15, 10**15), st.booleans(), st.text())
def test_what_a_config_prints_can_be_given_back(lr, steps, compile, name):
    cfg = Config(lr=lr, max_steps=steps, compile=compile, name=name)
    assert parse(Config, [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items()]) == cfg


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([f.name for f in dataclasses.fields(Config)]), st.text())
def test_any_text_gives_a_value_of_the_right_type_or_a_clear_error(key, text):
    try:
        cfg = parse(Config, [f"--{key}={text}"])
    except ValueError as error:
        assert key in str(error) and repr(text) in str(error)
    else:
        assert type(getattr(cfg, key)) is type(getattr(Config(), key))
