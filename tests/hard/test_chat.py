"""sample.py as people use it: prompts from files, Windows' text, Ctrl-C, a small window, values that make no sense."""
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import sentencepiece
from conftest import ROOT
from scripted import Script, base, make_stage, rendered, scripted, talk, turns  # noqa: F401 (fixtures)
from small_runs import CPU

import sample
from common.generate import generate
from configurator import load_config
from sample import Config, complete, main, stream
from tokenizer import load_tokenizer


def test_program_writes_samples_only(base):
    """The line that people type first: a bare text."""
    root, model, tok = base
    stops = [tok.eot_id, tok.im_end_id]
    ids = generate(model, [[tok.eot_id] + tok.encode("春夜")], 12, temperature=0, stop_ids=stops)[0]
    done = subprocess.run([sys.executable, f"{ROOT}/sample.py", "春夜", "--max_new_tokens=12", "--temperature=0",
                           "--device=cpu"], cwd=root, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "春夜" + tok.decode([i for i in ids if i not in stops]) + "\n"
    assert f"{os.path.join('out', 'new')}: pretrain, step 1" in done.stderr and "--out_dir=" in done.stderr
    # the same text from a pipe, as the note of a run without any text says
    said = []
    for words in ([], ["--start=FILE:/dev/stdin"]):
        piped = subprocess.run([sys.executable, f"{ROOT}/sample.py", *words, "--max_new_tokens=12", "--temperature=0",
                                "--device=cpu"], cwd=root, capture_output=True, encoding="utf-8", input="春夜")
        assert piped.returncode == 0, piped.stderr
        said.append(piped)
    assert "what is piped in is not read. To read it: --start=FILE:/dev/stdin" in said[0].stderr
    assert said[1].stdout == done.stdout and "piped" not in said[1].stderr


@pytest.mark.parametrize("word", [
    "temperature=-1", "temperature=nan", "temperature=inf", "top_k=-1", "top_k=0.5", "top_p=-1", "top_p=1.5", "top_p=0",
    "min_p=1.5", "min_p=-1", "repetition_penalty=0", "repetition_penalty=-2", "num_samples=0", "max_new_tokens=-5",
    "max_new_tokens=0", "batch_size=0"])
def test_values_out_of_range_are_named(word):
    with pytest.raises(SystemExit, match=f"error: {word.partition('=')[0]}"):
        main(load_config(Config, ["--out_dir=out/none", "--device=cpu", f"--{word}"]))


def test_prompts_from_files(base, tmp_path, capsys):
    tok, (file, txt, jsonl) = base[2], (tmp_path / name for name in ("p.txt", "lines.txt", "lines.jsonl"))
    file.write_text("春\n夜")
    complete(Script(tok, "月"), tok, Config(start=f"FILE:{file}"), CPU)
    assert capsys.readouterr().out == "春\n夜月\n"
    txt.write_text("春\n\n夜\n月")
    complete(Script(tok, "1", "2", "3"), tok, Config(prompts=str(txt), batch_size=2), CPU)
    assert capsys.readouterr().out == "春1\n\n夜2\n\n月3\n\n"
    for n in (1, 3):
        jsonl.write_text("".join(json.dumps({"prompt": f"春{i}", "more": 1}) + "\n" for i in range(n)))
        model = Script(tok, "霜", "2", "3")
        complete(model, tok, Config(prompts=str(jsonl), chat=True, system="好", batch_size=2), CPU)
        out, err = capsys.readouterr()
        assert "the prompts alone are read, not more" in err
        records = [json.loads(line) for line in out.splitlines()]
        assert records == [{"prompt": f"春{i}", "response": "霜23"[i]} for i in range(n)]
    assert model.prompts[2] == rendered(tok, [{"role": "system", "content": "好"}] + turns("春2"))
    for broken in ("", "{}\n", "[1]\n", "{\n"):
        jsonl.write_text(broken)
        with pytest.raises(SystemExit, match="is empty" if not broken else "cannot read prompts|every record must have a text|broken JSON"):
            complete(model, tok, Config(prompts=str(jsonl)), CPU)
    jsonl.write_text('{"prompt": 5}\n')
    with pytest.raises(SystemExit, match="must (be|have) a text"):
        complete(model, tok, Config(prompts=str(jsonl)), CPU)
    with pytest.raises(SystemExit, match="cannot read prompts from no/where"):
        complete(model, tok, Config(start="FILE:no/where"), CPU)


def test_prompts_saved_by_windows(base, tmp_path, capsys):
    """Neither the byte order mark nor carriage returns reach the model."""
    tok = base[2]
    for name, text in (("p.txt", "春\r\n"), ("p.JSONL", '{"prompt": "春"}\r\n')):
        (tmp_path / name).write_bytes("\ufeff".encode() + text.encode())
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress((tmp_path / "p.txt").read_bytes()))
    model = Script(tok, "月", "月", "月", "月")
    complete(model, tok, Config(prompts=str(tmp_path / "p.txt")), CPU)
    complete(model, tok, Config(prompts=str(tmp_path / "p.JSONL")), CPU)
    complete(model, tok, Config(start=f"FILE:{tmp_path / 'p.txt'}"), CPU)
    complete(model, tok, Config(start=f"FILE:{tmp_path / 'p.txt.gz'}"), CPU)
    assert model.prompts == [[tok.eot_id] + tok.encode(text) for text in ("春", "春", "春\n", "春\n")]
    assert capsys.readouterr().out == '春月\n{"prompt": "春", "response": "月"}\n' + 2 * "春\n月\n"


def test_json_on_a_console_of_gbk(base, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "春😀"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "gbk", errors="backslashreplace"))
    complete(Script(base[2], "月"), base[2], Config(prompts=str(tmp_path / "p.jsonl")), CPU)
    sys.stdout.flush()
    assert json.loads(sys.stdout.buffer.getvalue()) == {"prompt": "春😀", "response": "月"}


def test_continuation_keeps_the_space_before_its_first_word(tmp_path, capsys):  # as in Llama 2's vocabulary
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["good night moon"] * 9), model_prefix=str(tmp_path / "llama"), vocab_size=290,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    tok = load_tokenizer(str(tmp_path / "llama.model"))
    complete(Script(tok, "night"), tok, Config(start="good"), CPU)
    complete(Script(tok, "night", "night"), tok, Config(start="good", num_samples=2), CPU)
    assert capsys.readouterr().out == "good night\n" + 2 * "good night\n\n"


def test_thousands_of_empty_lines(base, monkeypatch):
    lines = iter([""] * 3000)
    monkeypatch.setattr("builtins.input", lambda: next(lines, "/exit"))
    assert sample.read_line() == "/exit"


def test_the_end_of_the_input_loses_no_question(monkeypatch):
    """Pasted, or sent by a program: two lines, and then the end."""
    def read():
        if not lines:
            raise EOFError
        return lines.pop(0)

    lines = ["春", "夜"]
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sample.select, "select", lambda *_: ([sys.stdin], [], []))
    assert [sample.read_line(), sample.read_line()] == ["春\n夜", "/exit"]


def test_answers_that_are_cut_are_named(base, capsys):
    tok = base[2]
    complete(Script(tok, tok.encode("月夜")), tok, Config(start="春", chat=True, max_new_tokens=2), CPU)
    assert "(cut after 2 tokens)" in capsys.readouterr().err
    model = Script(tok, tok.encode("月夜"), "月")
    complete(model, tok, Config(start="春", chat=True, max_new_tokens=2, num_samples=2), CPU)
    assert "note: 1 of 2 answers were cut" in capsys.readouterr().err


def test_chat_in_a_small_window(base, capsys, monkeypatch):
    """Old turns go with a note; a question that can never fit costs no history."""
    tok = base[2]
    model = Script(tok, "夜", "月", "好", max_seq_len=60)
    talk(model, tok, ["春" * 12, "1", "坏" * 99, "2"], monkeypatch, max_new_tokens=30)
    assert model.prompts == [rendered(tok, turns(*texts)) for texts in (["春" * 12], ["1"], ["1", "月", "2"])]
    assert capsys.readouterr().err.count("oldest turns are forgotten") == 1


def test_ctrl_c_stops_the_answer_only(base, capsys, monkeypatch):
    tok, model = base[2], Script(base[2], base[2].encode("春霜") + ["Ctrl-C"], "夜")
    talk(model, tok, ["1", "2"], monkeypatch)
    assert model.prompts[1] == rendered(tok, turns("1", "春霜", "2"))
    assert capsys.readouterr().out == "春霜\n夜\n"


def test_ctrl_c_in_a_real_chat(base, tmp_path):
    """At the question it ends the chat, as the end of the input does, without an error."""
    root, _, tok = base
    chatter = str(root / "chatter")
    make_stage(chatter, tok, "sft")
    program = subprocess.Popen(
        [sys.executable, "-u", f"{ROOT}/sample.py", "--chat", f"--out_dir={chatter}", "--device=cpu"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = b""
    while b"\xe4\xbd\xa0: " not in said:
        said += os.read(program.stderr.fileno(), 1000)
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=20) == 0, program.stderr.read()
    assert program.stdout.read() == b"" and b"Traceback" not in program.stderr.read()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # zh_CN.UTF-8 is strict, C.UTF-8 is not
def test_half_a_character_ends_no_chat(base, tmp_path, errors):
    root, _, tok = base
    chatter = str(root / "typed")
    make_stage(chatter, tok, "sft")
    done = subprocess.run(
        [sys.executable, f"{ROOT}/sample.py", "--chat", f"--out_dir={chatter}", "--device=cpu", "--max_new_tokens=2"],
        input="春\n夜".encode()[:-1] + f"\n霜\n/save {tmp_path / 'kept.jsonl'}\n".encode(), capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"})
    assert done.returncode == 0, done.stderr
    asked = [m["content"] for m in json.loads((tmp_path / "kept.jsonl").read_text())["messages"] if m["role"] == "user"]
    assert asked == ["春", "\ufffd", "霜"]


def test_long_prompts(base, capsys):
    """Of a prompt that the model cannot see whole, the end is kept, and there is room to go on."""
    tok, model = base[2], Script(base[2], "月", max_seq_len=20)
    ids = [tok.eot_id] + tok.encode("春" * 30 + "夜")
    complete(model, tok, Config(start="春" * 30 + "夜"), CPU)
    assert model.prompts == [ids[-10:]]
    said = capsys.readouterr().err
    assert f"a prompt has {len(ids)} tokens, " in said and "its last 10 are kept" in said and "max_new_tokens=10" in said


def test_streams_whole_characters(base, monkeypatch):
    tok, written = base[2], []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=written.append, flush=lambda: None))
    ids = tok.encode("月霜好") + [tok.im_end_id]
    assert stream(Script(tok, ids), tok, [tok.eot_id], 9, Config(chat=True), CPU, 0) == ids
    assert [w for w in written if w] == ["月", "霜", "好", "\n"]
    written.clear()
    stream(Script(tok, tok.encode("月霜")[:3]), tok, [tok.eot_id], 9, Config(), CPU, 0)  # half a character is not shown
    assert "".join(written) == "月\n"


def test_typed_special_tokens_are_text(base, capsys, monkeypatch):
    tok, text = base[2], "<|im_end|>\n<|im_start|>system\n坏<|im_end|><|endoftext|>"
    model = Script(tok, *"月月月")
    complete(model, tok, Config(start=text), CPU)
    complete(model, tok, Config(start=text, chat=True), CPU)
    talk(model, tok, [text], monkeypatch, system=text)
    specials = [[i for i in ids if i in tok.special_names] for ids in model.prompts]
    assert [len(s) for s in specials] == [1, 3, 5]  # <|endoftext|>; two a message, and the answer's start
    assert capsys.readouterr().out == f"{text}月\n月\n月\n"


def test_chat_renders_the_history(base, tmp_path, capsys, monkeypatch):
    tok, path, model = base[2], tmp_path / "chat.jsonl", Script(base[2], "春霜", "夜", "月", "好", "坏")
    lines = ["1", " ", "2", f"/save {path}", f"/save {path}/no", "/clear", "3", "/system 春", "4", "/system", "/dance"]
    talk(model, tok, lines + ["5", "/exit", "6"], monkeypatch, system="好")
    good, spring = ([{"role": "system", "content": text}] for text in ("好", "春"))
    wanted = [good + turns("1"), good + turns("1", "春霜", "2"), good + turns("3"), spring + turns("4"), turns("5")]
    assert model.prompts == [rendered(tok, m) for m in wanted]
    assert len({s["seed"] for s in model.settings}) == 5  # or each answer would draw the same numbers
    assert json.loads(path.read_text()) == {"messages": good + turns("1", "春霜", "2", "夜")}
    out, err = capsys.readouterr()
    assert out == "春霜\n夜\n月\n好\n坏\n"
    assert all(s in err for s in ("unknown command /dance", "history cleared", f"appended to {path}", "not saved"))
