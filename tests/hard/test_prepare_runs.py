"""prepare.py: errors, the command line, runs that are killed, stopped or out of disk."""
import glob
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import prepare
from configurator import load_config
from prepare import Config
from prepared import POEMS, Folder, corpus, read_all, run, small_tokenizer, write
from readers.folder import clear_leftovers

SCRIPT = os.path.abspath(prepare.__file__)


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- errors and the command line

@pytest.mark.parametrize("settings,message", [
    ({"input": "nowhere"}, "--input=nowhere does not exist"),
    ({"input": "other"}, r"no file to read: wanted .txt .*found 1 files with endings: .pdf"),
    ({"input": "empty.txt"}, "--input=empty.txt holds no records"),
    ({"kind": "sft", "tokenizer": ""}, "--kind=sft needs the tokenizer"),
    ({"fields": "story"}, "--fields=story: wanted NAME:VALUE,NAME:VALUE, where NAME is one of .*answer, .*question"),
    ({"fields": "txt:story"}, "--fields=txt:story: wanted NAME:VALUE"),
    ({"repeat": "c:2"}, "--repeat=c:2: wanted NAME:VALUE,NAME:VALUE, where NAME is one of a, b"),
    ({"repeat": "a:0"}, "--repeat=a:0: wanted a:1 to a:255"),
    ({"repeat": "a:x"}, "--repeat=a:x: wanted a:1 to a:255"),
    ({"name": "../x"}, "the name '../x' cannot be that of a folder"),
    ({"name": "raw"}, "data/raw exists and was not made by prepare.py"),
    ({"tokenizer": "nowhere.model"}, "no tokenizer at nowhere.model"),
])
def test_errors_name_the_value_and_the_fix(tok_file, settings, message):
    corpus()
    os.makedirs("data/raw")
    os.mkdir("other")
    open("other/a.pdf", "w").close()
    open("empty.txt", "w").close()
    with pytest.raises((SystemExit, OSError), match=message):
        run(**{"tok_file": tok_file, **settings} if "tokenizer" not in settings else {"tok_file": "", **settings})
    assert os.listdir("data") == ["raw"]


@pytest.mark.parametrize("argument,said", [
    ("--kind=chat", "text, sft, pairs, prompts"), ("--txt_document=page", "blank, line, file"),
    ("--val_fraction=2", "0 to 1"), ("--workers=-1", "0 or more"), ("--vocab_size=0", "1 or more")])
def test_settings_have_a_range(argument, said):
    with pytest.raises(SystemExit, match=said):
        load_config(Config, ["x", argument], positional="name")


def command(*args):
    return [sys.executable, SCRIPT, *args]


def test_command_line(tok_file):
    corpus()
    done = subprocess.run(command("x", "--input=in", f"--tokenizer={tok_file}"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "read 300 records of 2 files = 300 kept + 0 dropped + 0 skipped" in done.stdout
    assert "characters a token" in done.stdout and "peak memory" in done.stdout
    again = subprocess.run(command("x", "--show=2"), capture_output=True, text=True)
    assert again.stdout.count("--- ") == 2 and again.stdout.count("<|endoftext|>") == 2
    wrong = subprocess.run(command("mine"), capture_output=True, text=True)
    assert wrong.returncode == 1 and "no --input given, and no recipe is named 'mine'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_recipes_are_prepared_with_their_settings(monkeypatch):
    poems = pytest.importorskip("recipes.poems")
    corpus()
    recipe = poems.Recipe(lambda raw_dir, options: "in", "text", {"vocab_size": 400, "min_length": 2})
    monkeypatch.setattr(poems, "RECIPES", {"poems-a": recipe})
    prepare.main(Config("poems-a", min_length=3, workers=1))
    meta = Folder("data/poems-a").meta
    assert meta["vocab_size"] <= 400 and meta["config"]["min_length"] == 3     # the user's word over the recipe's


# ---------------------------------------------------------------- runs that end early

def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["documents", "train.bin"])
def test_a_killed_run_leaves_the_old_folder_and_the_next_one_cleans_up(tok_file, when):
    corpus()
    old = read_all(run(tok_file))
    write("in/c.jsonl", [{"text": f"{poem * 5}第{i}首"} for i, poem in enumerate(POEMS * 10_000)])
    program = subprocess.Popen(command("x", "--input=in", f"--tokenizer={tok_file}", "--workers=2"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: glob.glob(f"data/x.tmp/*{when}"), when)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert os.path.exists("data/x.tmp") and not os.path.exists("data/x.tmp/meta.json")
    assert read_all(Folder("data/x")) == old
    os.remove("in/c.jsonl")
    assert read_all(run(tok_file)) == old
    assert os.listdir("data") == ["x"]


def test_workers_end_with_a_killed_parent(tok_file, tmp_path):
    corpus()
    write("in/c.jsonl", [{"text": f"{poem * 5}第{i}首"} for i, poem in enumerate(POEMS * 20_000)])
    program = subprocess.Popen(command("x", "--input=in", f"--tokenizer={tok_file}", "--workers=2"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers():
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline") as f, open(f"/proc/{pid}/stat") as g:
                    if "spawn_main" in f.read() and os.readlink(f"/proc/{pid}/cwd") == str(tmp_path):
                        found.append(g.read().split()[2] != "Z")
            except OSError:
                pass
        return sum(found)

    if not os.path.isdir("/proc"):
        program.kill()
        pytest.skip("reads /proc")
    wait_for(lambda: workers() == 2, "two workers")
    program.kill()
    program.wait()
    wait_for(lambda: workers() == 0, "the workers' end")


def test_killed_between_the_two_renames(tok_file):
    corpus()
    old = read_all(run(tok_file))
    os.rename("data/x", "data/x.old")
    os.makedirs("data/x.tmp")
    clear_leftovers("data/x")
    assert os.listdir("data") == ["x"] and read_all(Folder("data/x")) == old


def test_ctrl_c_ends_in_one_line_and_leaves_nothing(tok_file):
    corpus()
    write("in/c.jsonl", [{"text": f"{poem * 5}第{i}首"} for i, poem in enumerate(POEMS * 20_000)])
    for tokenizer, workers in ((tok_file, 1), (tok_file, 2), ("", 1)):
        program = subprocess.Popen(command("x", "--input=in", f"--tokenizer={tokenizer}", f"--workers={workers}"),
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        if tokenizer:
            wait_for(lambda: glob.glob("data/x.tmp/train.bin"), "tokens")
        else:
            wait_for(lambda: program.stdout.readline().startswith("training the tokenizer"), "its training")
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        said, _ = program.communicate(timeout=60)
        assert program.returncode == 130 and said.splitlines()[-1] == "stopped" and "Traceback" not in said
        assert os.listdir("data") == []


@pytest.fixture
def small_disk(tmp_path):
    """Make a disk of some kilobytes; data/ lies on it."""
    os.mkdir("data")

    def resize(kilobytes):
        options = f"size={kilobytes}k" + (",remount" if os.path.ismount("data") else "")
        mount = shutil.which("mount")
        if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", options, "tmpfs", "data"]).returncode:
            pytest.skip("may not mount a tmpfs here")

    yield resize
    if os.path.ismount("data"):
        subprocess.run(["umount", "--lazy", "data"], check=True)


@pytest.mark.parametrize("kilobytes", [100, 270, 330])
def test_a_full_disk_keeps_the_old_folder_and_says_so(tok_file, small_disk, kilobytes):
    """However far it comes: in the file of all documents, in that of their ends, in the tokens."""
    corpus(40)
    small_disk(1000)
    old = read_all(run(tok_file))
    write("in/c.jsonl", [{"text": f"{poem * 3}第{i}首"} for i, poem in enumerate(POEMS * 500)])
    small_disk(kilobytes)
    done = subprocess.run(command("x", "--input=in", f"--tokenizer={tok_file}", "--workers=1"), capture_output=True,
                          text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert os.listdir("data") == ["x"] and read_all(Folder("data/x")) == old


def test_a_file_that_may_not_grow_ends_in_one_line(tok_file):
    corpus(4000)
    old = read_all(run(tok_file))
    write("in/c.jsonl", [{"text": f"{poem}再{i}"} for i, poem in enumerate(POEMS * 1000)])
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "bash", *command("x", "--input=in", f"--tokenizer={tok_file}")]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "File too large" in done.stderr
    assert os.listdir("data") == ["x"] and read_all(Folder("data/x")) == old


def test_memory_does_not_grow_with_the_text(tok_file):
    if not os.path.isdir("/proc"):
        pytest.skip("peak memory as Linux counts it")
    peaks = []
    for megabytes in (2, 20):
        os.makedirs("in", exist_ok=True)
        write("in/a.jsonl", [{"text": f"{i}{''.join(POEMS) * 20}"} for i in range(megabytes * 300)])
        program = command("x", "--input=in", f"--tokenizer={tok_file}", "--workers=1")
        subprocess.run(program, check=True, capture_output=True)
        meta = Folder("data/x").meta
        assert meta["train"]["bytes"] > megabytes * 0.8e6
        peaks.append(meta["memory"])
    assert peaks[1] - peaks[0] < 30e6
