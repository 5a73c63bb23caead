"""configurator.py: what may be written, what is refused, and in which words."""
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
from conftest import ROOT
from configurator import Count, NonNegative, Positive, Share, Whole, changed, check, help_text, load_config, run


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


def parse(Config, argv, positional=None):
    return load_config(Config, argv, positional)


def refused(*argv, positional=None, Config=Config):
    with pytest.raises(SystemExit) as left:
        load_config(Config, list(argv), positional)
    message = str(left.value)
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


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
    ("--lr=fast", "lr wants a number, got 'fast' (from the command line)"),
    ("--lr=", "lr wants a number, got '' (from the command line)"),
    ("--lr=True", "lr wants a number, got 'True'"),
    ("--lr='1'", "lr wants a number"),
    ("--lr=(1,2)", "lr wants a number"),
    ("--max_steps=0.5", "max_steps wants a whole number, got '0.5' (from the command line)"),
    ("--max_steps=inf", "max_steps wants a whole number, got 'inf'"),
    ("--max_steps=nan", "max_steps wants a whole number, got 'nan'"),
    ("--max_steps=1e-5", "max_steps wants a whole number, got '1e-5'"),
    ("--max_steps=ten", "max_steps wants a whole number, got 'ten'"),
    ("--max_steps=True", "max_steps wants a whole number, got 'True'"),
    ("--max_steps=__import__('os').getcwd()", "max_steps wants a whole number"),
    ("--compile=yes", "compile wants True or False, got 'yes' (from the command line)"),
    ("--compile=2", "compile wants True or False, got '2'"),
    ("--compile=", "compile wants True or False, got ''"),
])
def test_wrong_types_name_key_type_value_and_source(argument, words):
    key, value = argument[2:].split("=", 1)
    message = refused(argument)
    assert message.startswith(words) and "(from the command line)" in message
    assert (repr(value) in message) or (value in message)


def test_values_of_a_config_file_are_checked_too(config_file):
    for text, words in [("max_steps = 0.5", "max_steps wants a whole number, got 0.5"),
                        ("lr = None", "lr wants a number, got None"), ("name = 5", "name wants text, got 5"),
                        ("compile = 'maybe'", "compile wants True or False, got 'maybe'"),
                        ("lr = [1]", "lr wants a number, got [1]"),
                        ("max_steps = True", "max_steps wants a whole number, got True")]:
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


@pytest.mark.parametrize("code,words", [("lr = 1 / 0", "ZeroDivisionError"), ("lr = = 1", "SyntaxError"),
                                        ("import nowhere_to_be_found", "ModuleNotFoundError")])
def test_a_config_file_that_fails_is_named(config_file, code, words):
    path = config_file(code)
    message = refused(path)
    assert message.startswith(f"config file {path}: {words}")


def test_a_function_is_no_value(config_file):
    assert refused(config_file("lr = max")).startswith("lr wants a number")


def test_a_number_beyond_all_floats():
    assert refused("--lr=1" + 400 * "0").startswith("lr wants a number")


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
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert '"data/x"' in lines["--data_dir"] and "str" in lines["--data_dir"]
    assert lines["--data_dir"].endswith("folder from prepare.py")
    assert "= 1e-3 " in lines["--lr"] and "float" in lines["--lr"] and lines["--lr"].endswith("peak learning rate")
    assert "= 1000 " in lines["--max_steps"] and lines["--max_steps"].endswith("steps of the whole run")
    assert "= True " in lines["--compile"] and "bool" in lines["--compile"]
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
    text = help_text(pretrain.Config)
    for field in dataclasses.fields(pretrain.Config):
        assert f"--{field.name}: " in text
    assert "torchrun" in text and "micro-steps in a step, all processes together" in text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False), st.integers(-10**15, 10**15), st.booleans(), st.text())
def test_what_a_config_prints_can_be_given_back(lr, steps, compile, name):
    cfg = Config(lr=lr, max_steps=steps, compile=compile, name=name)
    assert parse(Config, [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items()]) == cfg


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([f.name for f in dataclasses.fields(Config)]), st.text())
@example("lr", "{[]}")  # Python's own words for it would be a TypeError
@example("max_steps", "1+2j")
@example("compile", "\0")
@example("max_steps", "9" * 5000)
def test_any_text_gives_a_value_of_the_right_type_or_a_clear_error(key, text):
    try:
        cfg = parse(Config, [f"--{key}={text}"])
    except SystemExit as error:
        assert key in str(error) and repr(text) in str(error)
    else:
        assert type(getattr(cfg, key)) is type(getattr(Config(), key))


# ---------------------------------------------------------------------------- ranges


@dataclass
class Ranges:
    count: Count = 1
    whole: Whole = 0
    positive: Positive = 1.0
    non_negative: NonNegative = 0.0
    share: Share = 0.5
    choice: Literal["adamw", "muon"] = "adamw"


RANGES = {  # field: (what it wants, values it takes, values it refuses)
    "count": ("a whole number, 1 or more", ["1", "7", "1e3", "2.0"], ["0", "-1", "0.5", "1.5", "inf", "nan", "", "x"]),
    "whole": ("a whole number, 0 or more", ["0", "7", "1e3"], ["-1", "0.5", "-0.5", "inf", "nan", "True"]),
    "positive": ("a number above 0", ["1e-30", "3", "0.5"], ["0", "-1", "-1e-30", "inf", "nan", "-inf", "''"]),
    "non_negative": ("a number, 0 or more", ["0", "0.0", "3", "0.5"], ["-1e-30", "-1", "inf", "nan"]),
    "share": ("a number from 0 to 1", ["0", "1", "0.5", "1.0"], ["-0.01", "1.01", "2", "inf", "nan"]),
}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_its_range_is_refused_where_it_is_read(key, config_file):
    words, good, bad = RANGES[key]
    for value in good:
        got = getattr(load_config(Ranges, [f"--{key}={value}"]), key)
        assert got == float(value) and type(got) is type(getattr(Ranges(), key))
    for value in bad:
        message = refused(f"--{key}={value}", Config=Ranges)
        assert message == f"{key} wants {words}, got {value!r} (from the command line)"
    path = config_file(f"{key} = -1")
    assert refused(path, Config=Ranges) == f"{key} wants {words}, got -1 (from {path})"


def test_a_word_that_is_none_of_the_choices():
    assert load_config(Ranges, ["--choice=muon"]).choice == "muon"
    for value in ("sgd", "", "Muon", "adamw,muon"):
        message = refused(f"--choice={value}", Config=Ranges)
        assert message == f"choice={value!r} (from the command line): known are adamw, muon"


STAGES = ["pretrain", "sft", "reward", "ppo", "dpo"]


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_starts_with_a_setting_that_makes_no_sense(stage):
    """The defaults of every stage pass their own checks; zero, negative and NaN do not where they mean nothing."""
    Config = importlib.import_module(stage).Config
    fields = {f.name: f.default for f in dataclasses.fields(Config)}
    load_config(Config, [f"--{name}={value}" for name, value in fields.items()])
    for key in ("batch_size", "grad_accum", "eval_every", "log_every", "lr", "max_steps"):
        if key in fields:
            for value in ("nan", "-1") + (("0",) if key != "max_steps" else ()):
                assert refused(f"--{key}={value}", Config=Config).startswith(f"{key} wants a ")
    for key in ("warmup_steps", "grad_clip", "weight_decay", "min_lr"):
        if key in fields:
            assert refused(f"--{key}=-1", Config=Config).startswith(f"{key} wants a ")
    for key in ("optimizer", "dtype", "loss", "advantage"):
        if key in fields:
            message = refused(f"--{key}=sgd", Config=Config)
            assert message.startswith(f"{key}='sgd'") and ": known are " in message


# ---------------------------------------------------------------------------- what run() makes of errors


def ends(main, monkeypatch, capsys, **environment):
    """run() a main; return the exit code and what stands on stderr as the interpreter would print it."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for name in ("RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        run(main, Config)
    printed = capsys.readouterr().err
    if isinstance(left.value.code, str):
        return 1, printed + left.value.code
    return left.value.code, printed


def raises(error):
    def main(cfg):
        raise error
    return main


@pytest.mark.parametrize("error, words", [
    (FileNotFoundError(2, "No such file or directory", "x.txt"), "error: [Errno 2] No such file or directory: 'x.txt'"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    (ValueError("head_dim=7 must be even"), "error: head_dim=7 must be even")])
def test_what_a_user_can_cause_ends_in_one_line(error, words, monkeypatch, capsys):
    assert ends(raises(error), monkeypatch, capsys) == (1, words)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")])
def test_too_little_memory_ends_in_one_line(error, monkeypatch, capsys):
    code, words = ends(raises(error), monkeypatch, capsys)
    assert code == 1 and words.startswith("error: not enough memory: ") and "--batch_size" in words
    assert "\n" not in words


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    assert ends(raises(KeyboardInterrupt()), monkeypatch, capsys) == (130, "stopped\n")


def test_a_fault_of_ours_shows_where(monkeypatch):
    """What no user caused keeps its traceback; alone it is Python's own."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KeyError):
        run(raises(KeyError("lost")), Config)


def test_under_torchrun_rank_0_speaks_for_all(monkeypatch, capsys, tmp_path):
    """The others wait for torchrun to end them. It closes with a report, whose reason is our line."""
    waits = []
    monkeypatch.setattr(configurator.time, "sleep", waits.append)
    handlers = []
    monkeypatch.setattr(configurator.signal, "signal", lambda *arguments: handlers.append(arguments))
    report = tmp_path / "error.json"
    main = lambda cfg: check(False, "no data here")
    code, words = ends(main, monkeypatch, capsys, RANK="0", TORCHELASTIC_ERROR_FILE=str(report))
    assert (code, words) == (1, "error: no data here") and not waits
    assert json.loads(report.read_text())["message"]["message"] == "error: no data here"
    code, words = ends(main, monkeypatch, capsys, RANK="1", TORCHELASTIC_ERROR_FILE=str(report))
    assert (code, words) == (1, "error: rank 1: no data here")  # only where rank 0 had no error of its own
    assert waits == [5] and len(handlers) == 1
    code, words = ends(raises(KeyError("lost")), monkeypatch, capsys, RANK="0", TORCHELASTIC_ERROR_FILE=str(report))
    assert code == 1 and words.count("Traceback") == 1 and words.endswith("error: KeyError: 'lost'")
    code, words = ends(raises(KeyError("lost")), monkeypatch, capsys, RANK="1", TORCHELASTIC_ERROR_FILE=str(report))
    assert code == 1 and "Traceback" not in words


def test_settings_that_cannot_be_read_end_in_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--lr=fast"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="error: lr wants a number, got 'fast'"):
        run(lambda cfg: None, Config)


@pytest.mark.parametrize("words", [
    *([f"{name}.py"] for name in ("prepare", "pretrain", "sft", "reward", "ppo", "dpo", "lora", "sample", "evaluate")),
    ["-m", "tools.serve"], ["-m", "tools.export"]], ids=lambda words: words[-1])
def test_without_the_packages_a_script_says_how_to_get_them(words):
    """-S: a Python that knows nothing of what is installed in .venv."""
    done = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        f"error: torch is not installed in this Python ({sys.executable}). Run `source .venv/bin/activate`, or "
        "`pip install -r requirements.txt`\n")


def test_a_console_without_chinese_prints_escapes():
    code = ("from dataclasses import dataclass\nfrom configurator import check, run\n"
            "@dataclass\nclass Config:\n    x: int = 1\n"
            "def main(cfg):\n    print('\u5e8a')\n    check(False, '\u524d')\n"
            "run(main, Config)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (1, b"\\u5e8a\n", b"error: \\u524d\n")
