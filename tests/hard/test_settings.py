"""Settings of all stages, odd texts as values, and what run() makes of errors: one line, an exit code, no traceback."""
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_runs import STAGES

import configurator
from configurator import Count, NonNegative, Positive, Share, Whole, check, help_text, load_config, run
from test_configurator import config_file, refused  # noqa: F401 (fixture)


@dataclass
class Config:  # as that of test_configurator.py, without the setting that needs another
    name: str = ""
    lr: float = 1e-3
    max_steps: int = 1000
    compile: bool = True


# ---------------------------------------------------------------------------- values


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False), st.integers(-10**15, 10**15), st.booleans(), st.text())
def test_what_a_config_prints_can_be_given_back(lr, steps, compile, name):
    cfg = Config(lr=lr, max_steps=steps, compile=compile, name=name)
    assert load_config(Config, [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items()]) == cfg


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([f.name for f in dataclasses.fields(Config)]), st.text())
@example("lr", "{[]}")  # Python's own words for it would be a TypeError
@example("max_steps", "1+2j")
@example("compile", "\0")
@example("max_steps", "9" * 5000)
def test_any_text_gives_a_value_of_the_right_type_or_a_clear_error(key, text):
    try:
        cfg = load_config(Config, [f"--{key}={text}"])
    except SystemExit as error:
        assert key in str(error) and repr(text) in str(error)
    else:
        assert type(getattr(cfg, key)) is type(getattr(Config(), key))


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_starts_with_a_setting_that_makes_no_sense(stage):
    """The defaults of every stage pass their own checks; zero, negative and NaN do not where they mean nothing."""
    Config = importlib.import_module(stage).Config
    fields = {f.name: f.default for f in dataclasses.fields(Config)}

    def refused(word):
        with pytest.raises(SystemExit) as left:
            load_config(Config, [word])
        return str(left.value).removeprefix("error: ")

    for name, value in fields.items():
        assert configurator.read_value(Config, name, str(value), "here") == value
    for key in ("batch_size", "grad_accum", "eval_every", "log_every", "lr", "max_steps"):
        if key in fields:
            for value in ("nan", "-1") + (("0",) if key != "max_steps" else ()):
                assert refused(f"--{key}={value}").startswith(f"{key} wants a ")
    for key in ("warmup_steps", "grad_clip", "weight_decay", "min_lr"):
        if key in fields:
            assert refused(f"--{key}=-1").startswith(f"{key} wants a ")
    for key in ("optimizer", "dtype", "loss", "advantage"):
        if key in fields:
            message = refused(f"--{key}=sgd")
            assert message.startswith(f"{key}='sgd'") and ": known are " in message
    text = help_text(Config)
    assert all(f"--{name}: " in text for name in fields) and "torchrun" in text or stage == "ppo"


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
    (ValueError("head_dim=7 must be even"), "error: head_dim=7 must be even"),
    (ModuleNotFoundError("No module named 'x'", name="x"), f"error: x is not installed in this Python ({sys.executable}"
     "). Run `source .venv/bin/activate`, or `pip install -r requirements.txt`")])
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


def test_a_console_without_chinese_prints_escapes():
    code = ("from dataclasses import dataclass\nfrom configurator import check, run\n"
            "@dataclass\nclass Config:\n    x: int = 1\n"
            "def main(cfg):\n    print('\u5e8a')\n    check(False, '\u524d')\n"
            "run(main, Config)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (1, b"\\u5e8a\n", b"error: \\u524d\n")


@pytest.mark.parametrize("code,words", [("lr = 1 / 0", "ZeroDivisionError"), ("lr = = 1", "SyntaxError"),
                                        ("import nowhere_to_be_found", "ModuleNotFoundError")])
def test_a_config_file_that_fails_is_named(config_file, code, words):  # noqa: F811
    path = config_file(code)
    message = refused(path)
    assert message.startswith(f"config file {path}: {words}")


# ---------------------------------------------------------------------------- types and ranges


@dataclass
class Ranges:
    number: float = 1.0
    integer: int = 1
    switch: bool = True
    count: Count = 1
    whole: Whole = 0
    positive: Positive = 1.0
    non_negative: NonNegative = 0.0
    share: Share = 0.5
    choice: Literal["adamw", "muon"] = "adamw"


WANTED = {  # field: (what it wants, values it takes, values it refuses)
    "number": ("a number", ["3e-4", "-2", "inf"], ["fast", "", "True", "'1'", "(1,2)"]),
    "integer": ("a whole number", ["-1", "1e5", "20.0", "10_000"], ["0.5", "inf", "nan", "1e-5", "ten", "True", "f()"]),
    "switch": ("True or False", ["0", "1"], ["yes", "2", ""]),
    "count": ("a whole number, 1 or more", ["1", "1e3", "2.0"], ["0", "-1", "0.5", "1.5", "inf", "nan", "", "x"]),
    "whole": ("a whole number, 0 or more", ["0", "7", "1e3"], ["-1", "0.5", "-0.5", "inf", "nan", "True"]),
    "positive": ("a number above 0", ["1e-30", "3", "0.5"], ["0", "-1", "-1e-30", "inf", "nan", "-inf", "''"]),
    "non_negative": ("a number, 0 or more", ["0", "3", "0.5"], ["-1e-30", "-1", "inf", "nan"]),
    "share": ("a number from 0 to 1", ["0", "1", "0.5"], ["-0.01", "1.01", "2", "inf", "nan"])}


@pytest.mark.parametrize("key", WANTED)
def test_a_value_of_the_wrong_kind_is_refused_where_it_is_read(key, config_file):  # noqa: F811
    """The message names the setting, what it wants, the value and where it comes from."""
    words, good, bad = WANTED[key]
    for value in good:
        got = getattr(load_config(Ranges, [f"--{key}={value}"]), key)
        assert got == float(value) and type(got) is type(getattr(Ranges(), key))
    for value in bad:
        message = refused(f"--{key}={value}", Config=Ranges)
        assert message == f"{key} wants {words}, got {value!r} (from the command line)"
    path = config_file(f"{key} = [1]")
    assert refused(path, Config=Ranges) == f"{key} wants {words}, got [1] (from {path})"


def test_a_word_that_is_none_of_the_choices():
    assert load_config(Ranges, ["--choice=muon"]).choice == "muon"
    for value in ("sgd", "", "Muon", "adamw,muon"):
        message = refused(f"--choice={value}", Config=Ranges)
        assert message == f"choice={value!r} (from the command line): known are adamw, muon"
