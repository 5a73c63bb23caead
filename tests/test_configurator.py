"""configurator.py: what may be written, what is refused, and in which words."""
import dataclasses
import os
from dataclasses import dataclass

import pytest

from configurator import changed, load_config


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
    chat: bool = False


NEEDS = {"batch_size": "chat"}  # as beside the Config of a script: what must hold, or the setting changes nothing


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="conf.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


def refused(*argv, positional=None, Config=Config):
    with pytest.raises(SystemExit) as left:
        load_config(Config, list(argv), positional)
    message = str(left.value)
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


def test_defaults():
    assert load_config(Config, []) == Config()
    assert changed(Config()) == {}


@pytest.mark.parametrize("argument, key, value", [
    ("--lr=3e-4", "lr", 3e-4), ("--lr=1", "lr", 1.0), ("--lr=inf", "lr", float("inf")), ("--lr=1_000", "lr", 1000.0),
    ("--max_steps=20", "max_steps", 20), ("--max_steps=1e5", "max_steps", 100_000), ("--max-steps=7", "max_steps", 7),
    ("--compile=False", "compile", False), ("--compile=false", "compile", False), ("--compile=0", "compile", False),
    ("--name=a=b", "name", "a=b"), ("--name=", "name", ""), ("--name=5", "name", "5"), ("--name=None", "name", "None"),
    ("--name= two words ", "name", " two words "), ("--name=床前明月光", "name", "床前明月光"), ("--name=x.py", "name", "x.py")])
def test_values_of_the_command_line(argument, key, value):
    cfg = load_config(Config, [argument])
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
    assert dataclasses.replace(cfg, **{key: getattr(Config(), key)}) == Config()  # and nothing else changed


def test_the_name_alone_switches_something_on():
    """--chat is --chat=True; settings that are not switches want a value."""
    assert load_config(Config, ["--chat"]).chat is True and load_config(Config, ["--chat=False"]).chat is False
    assert refused("--lr", "3e-4") == "write --lr as --lr=VALUE"
    assert refused("--name") == "write --name as --name=VALUE"


def test_a_setting_that_changes_nothing_is_refused(config_file):
    """It names what must hold. What stands in a file may lose its sense by a word of the command line."""
    message = refused("--batch_size=4")
    assert message == "batch_size=4 changes nothing unless chat. Set that, or leave batch_size out"
    assert load_config(Config, ["--batch_size=4", "--chat"]).batch_size == 4
    path = config_file("batch_size = 4\nchat = True")
    assert load_config(Config, [path]).batch_size == load_config(Config, [path, "--chat=False"]).batch_size == 4
    assert "changes nothing unless chat" in refused(config_file("batch_size = 4", "other.py"))


def test_values_of_a_config_file_are_checked_too(config_file):
    for text, words in [("max_steps = 0.5", "max_steps wants a whole number, got 0.5"),
                        ("lr = None", "lr wants a number, got None"), ("name = 5", "name wants text, got 5"),
                        ("compile = 'maybe'", "compile wants True or False, got 'maybe'"),
                        ("lr = [1]", "lr wants a number, got [1]"),
                        ("max_steps = True", "max_steps wants a whole number, got True")]:
        path = config_file(text)
        assert refused(path) == f"{words} (from {path})"
    cfg = load_config(Config, [config_file("lr = 1\nmax_steps = 1e5")])
    assert (cfg.lr, cfg.max_steps) == (1.0, 100_000)
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
    assert refused("lr=3").startswith("cannot read 'lr=3': settings are --key=value")
    assert refused("-lr=3").startswith("cannot read '-lr=3'")
    missing = str(tmp_path / "none.py")
    message = refused(missing)
    assert missing in message and "does not exist" in message and os.getcwd() in message


def test_a_config_file_may_compute(config_file):
    """Imports, functions and names that begin with an underscore are the file's own business."""
    cfg = load_config(Config, [config_file("""
from math import ceil
from pathlib import Path
_tokens = 1_000_000
_double = lambda x: 2 * x

def steps(tokens):
    return ceil(tokens / batch_size)

chat = True
batch_size = 8 * 4
max_steps = steps(_tokens)
lr = _double(1) * 1e-3
""")])
    assert cfg == Config(batch_size=32, max_steps=31250, lr=2e-3, chat=True)


def test_the_command_line_wins_wherever_it_stands(config_file):
    path = config_file("lr = 0.5\nmax_steps = 5\nname = 'file'")
    for argv in ([path, "--lr=0.1"], ["--lr=0.1", path]):
        assert load_config(Config, argv) == Config(lr=0.1, max_steps=5, name="file")
    second = config_file("lr = 0.7", "second.py")
    assert load_config(Config, [path, second]).lr == 0.7  # the later file wins
    assert load_config(Config, [second, path]).lr == 0.5
    assert load_config(Config, [path, "--lr=0.1", second]).lr == 0.1
    assert load_config(Config, ["--lr=1", "--lr=2"]).lr == 2.0


def test_positional(config_file):
    path = config_file("name = 'file'")
    assert load_config(Config, ["poems"], "name").name == "poems"
    assert load_config(Config, ["--lr=1", "poems"], "name") == Config(lr=1.0, name="poems")
    for argv in ([path, "poems"], ["poems", path]):
        assert load_config(Config, argv, "name").name == "poems"
    assert "cannot read 'again'" in refused("poems", "again", positional="name")
    assert "cannot read 'poems'" in refused("poems")


def test_changed_lists_what_differs():
    assert changed(load_config(Config, ["--lr=1", "--max_steps=1000", "--compile=0"])) == {"lr": 1.0, "compile": False}


def test_help(capsys):
    """The script's docstring and the fields with their comments, whatever else is wrong."""
    with pytest.raises(SystemExit) as left:
        load_config(Config, ["--lr=fast", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(__doc__.strip())
    for line in ('--data_dir: str = "data/x"      # folder from prepare.py',
                 "--lr: float = 1e-3              # peak learning rate", "--batch_size: int = 16"):
        assert f"    {line}\n" in text
    order = [text.index(word) for word in ("files\n", "--data_dir", "--name", "optimizer\n", "--lr", "--compile")]
    assert order == sorted(order)
