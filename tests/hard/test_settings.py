"""Settings of all stages, odd texts as values, and what run() makes of errors: one line, an exit code, no traceback."""
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_runs import STAGES

import configurator
from configurator import check, help_text, load_config, run


@dataclass
class Config:
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
    *([f"{name}.py"] for name in ("prepare", *STAGES, "sample")),
    *(["-m", f"tools.{name}"] for name in ("serve", "export", "evaluate"))], ids=lambda words: words[-1])
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (1, b"\\u5e8a\n", b"error: \\u524d\n")
