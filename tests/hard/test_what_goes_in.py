"""What goes in without being said wrongly: fields by what they hold, lists, marks, tables, control tokens, splits."""
import json
import os
import re

import pytest

from prepared import POEMS, messages, run, small_tokenizer, write
from readers.account import Skip
from readers.calls import call_tools, list_tools
from readers.folder import new_folder
from readers.markers import find_markers
from readers.schemas import convert, unfold
from tokenizer import render_chat


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")


def skipped(record, kind, fields=()):
    """The reason why a record cannot be used, and what is said of it."""
    with pytest.raises(Skip) as e:
        convert(record, kind, fields)
    return str(e.value)


# ---------------------------------------------------------------- tools

CITY = {"city": "北京"}


@pytest.mark.parametrize("call", [
    {"name": "weather", "arguments": CITY}, {"name": "weather", "parameters": CITY}, {"name": "weather", "args": CITY},
    {"name": "weather", "input": CITY}, {"name": "weather", "arguments": json.dumps(CITY)},
    {"id": "a", "type": "function", "function": {"name": "weather", "arguments": json.dumps(CITY)}},
    {"id": "a", "index": 0, "name": "weather", "arguments": {**CITY, "day": None}},  # Arrow fills in nulls
])
def test_arguments_of_calls_by_any_name(call):
    want = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert call_tools([call]) == call_tools(json.dumps([call])).replace(', "day": null', "") == want


@pytest.mark.parametrize("call", [
    {"tool": "weather", "tool_input": CITY}, {"function": "weather", "arguments": CITY}, "weather(北京)", ["weather", "北京"],
    {"name": "weather", "arguments": {}, "parameters": CITY}, {"name": "weather", "tool_input": CITY},
    {"function": {"name": "weather"}, "city": "北京"},
])
def test_calls_of_another_form_stay_as_they_are(call):
    assert call_tools([call]).split("\n")[1] == (call if isinstance(call, str) else json.dumps(call, ensure_ascii=False))


@pytest.mark.parametrize("called,result", [("function_call", "observation"), ("tool_call", "tool_response")])
def test_turns_that_call_and_return(called, result):
    call = {"name": "weather", "args": CITY}
    turns = [{"role": called, "content": call}, {"role": result, "content": "晴"}]
    got = convert({"messages": [*messages("u:天气？"), *turns, *messages("a:晴天")]}, "sft")[0]
    assert [m["role"] for m in got] == ["user", "assistant", "tool", "assistant"]
    assert got[1]["content"] == call_tools([call])


@pytest.mark.parametrize("turn", [
    {"content": "", "toolCalls": [{"name": "weather", "arguments": CITY}]},
    {"content": "", "calls": {"name": "weather", "args": CITY}},
    {"content": json.dumps(CITY), "metadata": "weather"},  # GLM-4
])
def test_calls_by_any_name(turn):
    got, notes = convert({"messages": [*messages("u:天气？"), {"role": "assistant", **turn}]}, "sft")
    assert got[1]["content"] == call_tools([{"name": "weather", "arguments": CITY}]) and not notes.ignored


TOOL = {"name": "weather", "description": "查天气"}


@pytest.mark.parametrize("record", [
    {"available_tools": [TOOL], "messages": messages("u:问", "a:答")},
    {"messages": [{"role": "system", "content": "", "functions": json.dumps([TOOL])}, *messages("u:问", "a:答")]},
])
def test_tools_by_any_name(record):
    assert convert(record, "sft")[0][0]["content"] == list_tools([TOOL])


def test_tools_lose_nulls_alone():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}, "x": None}}}
    assert list_tools([tool]) == '<tools>\n{"name": "weather", "parameters": {"city": {"type": "string"}}}\n</tools>'


def test_a_part_with_two_texts_is_asked_about():
    parts = [{"type": "text", "text": "问", "translation": "另一个问题"}]
    assert "which is the text?" in skipped({"messages": [{"role": "user", "content": parts}, *messages("a:答")]}, "sft")


# ---------------------------------------------------------------- questions, answers, choices

EXAM = messages("u:月亮？\nA. 一\nB. 二\nC. 三", "a:B")


@pytest.mark.parametrize("record", [
    {"id": 1, "question": "月亮？", "A": "一", "B": "二", "C": "三", "answer": "B"},
    {"": 1, "Question": "月亮？", "A": "一", "B": "二", "C": "三", "Answer": "B"},
    {"question": "月亮？", "choices": ["一", "二", "三"], "answer": "B"},
    {"question": "月亮？", "options": '["A. 一", "B. 二", "C. 三"]', "answer": "B"},
    {"question": "月亮？", "choices": {"label": ["A", "B", "C"], "text": ["一", "二", "三"]}, "answer": "B"},
    {"question": "月亮？", "option": {"A": "一", "B": "二", "C": "三"}, "answer": "B"},
    {"question": "月亮？", "option_a": "一", "option_b": "二", "option_c": "三", "answer": "B"},
    {"question": "月亮？", "选项A": "一", "选项B": "二", "选项C": "三", "answer": "B"},
    {"question": "月亮？", "options": [{"key": k, "value": v} for k, v in zip("ABC", "一二三")], "answer": "B"},
    {"question": "月亮？", "options": "['一', '二', '三']", "answer": "B"},  # a list in a .csv of pandas
])
def test_choices_are_a_part_of_the_question(record):
    got, notes = convert(record, "sft")
    assert got == EXAM and not any(notes.ignored.values())


def test_ten_choices_and_words_that_begin_with_their_letter():
    record = {"question": "Which?", "choices": ["Apple", "Banana", *map(str, range(8))], "answer": "J"}
    assert convert(record, "sft")[0][0]["content"].split("\n")[1::9] == ["A. Apple", "J. 7"]
    record["choices"] *= 2
    assert skipped(record, "sft").startswith("too many choices")


@pytest.mark.parametrize("record,hint", [
    ({"question": "月亮？", "candidates": ["一", "二", "三"], "answer": "B"}, "choices:candidates"),
    ({"question": "月亮？", "sol1": "一", "sol2": "二", "sol3": "三", "answer": "B"}, "A:sol1,B:sol2,C:sol3"),
    ({"question": "月亮？", "candidates": ["一", "二", "三"], "chosen": "B", "rejected": "A"}, "choices:candidates"),
    ({"question": "月亮？", "candidate": "A. 一\nB. 二\nC. 三", "answer": "（B）"}, "choices:candidate"),
])
def test_choices_of_an_unknown_name_are_asked_about(record, hint):
    kind = "pairs" if "chosen" in record else "sft"
    said = skipped(record, kind)
    advice = re.findall("--fields=([^ ;]*)", said)
    assert said.startswith("choices left out") and advice[0].endswith(hint)
    fields = [[tuple(item.split(":")) for item in each.split(",")] for each in advice]
    got = [convert(record, kind, each)[0] for each in fields]
    prompts = [each["prompt"][0] if kind == "pairs" else each[0] for each in got]
    assert prompts == [EXAM[0], messages("u:月亮？")[0]]
    assert skipped({**record, "answer": "B"}, "prompts").startswith("choices left out")


def test_choices_are_not_left_out_by_fields():
    record = {"Question": "月亮？", "A": "一", "B": "二", "C": "三", "Answer": "B"}
    said = skipped(record, "sft", [("question", "Question"), ("answer", "Answer")])
    fields = [tuple(item.split(":")) for item in re.search("--fields=([^ ]*)", said)[1].split(",")]
    assert said.startswith("choices left out") and convert(record, "sft", fields)[0] == EXAM


def test_the_number_of_a_choice_is_asked_about():
    for answer in (1, "1"):
        assert "from 0 or from 1?" in skipped({"question": "月亮？", "choices": ["一", "二"], "answer": answer}, "sft")
    assert convert({"question": "一加一？", "choices": ["1", "2"], "answer": "2"}, "sft")[0][1]["content"] == "2"


@pytest.mark.parametrize("record,kind", [
    ({"input": ["甲问", "乙问"], "output": ["甲答", "乙答"]}, "sft"), ({"question": [["怎么吃", "用法"]], "answer": ["一次"]}, "sft"),
    ({"input": ["甲问", "乙问"], "output": ["甲答", "乙答"]}, "pairs"), ({"prompt": ["甲问", "乙问"]}, "prompts"),
    ({"prompt": ["甲问", "乙问"], "chosen": "好", "rejected": "坏"}, "pairs"),
    ({"instruction": ["甲问", "乙问"], "input": "文", "output": "答"}, "sft"),
])
def test_texts_in_a_question_never_take_turns(record, kind):
    said = skipped(record, kind)
    assert said.startswith("several questions") and "kind=pairs" not in said
    assert convert({"prompt": ["问"]}, "prompts")[0] == messages("u:问")


@pytest.mark.parametrize("record,said", [
    ({"messages": [*messages("u:问"), {"role": "assistant", "content": ["一", "二"]}]}, "several texts"),
    ({"messages": [messages("u:问", "a:答"), messages("u:又问", "a:又答")]}, "several conversations"),
    ({"dialogue": ["A: 问", "B: 答"]}, "unknown role: 'B'"), ({"conversation": ["客服：问", "顾客：答"]}, "unknown role: '客服'"),
    ({"instruction": "总结", "input": {"question": "甲", "answer": "乙"}, "output": "答"}, "wrong type: input holds fields"),
    ({"instruction": "翻译：{input}", "input": "月", "output": "moon"}, "a gap to fill in: instruction says {input}"),
    ({"prompt": "一个很长很长的问题？", "completion": "一个很长很长的问题？\n答"}, "the answer holds its question"),
    ({"messages": [{**messages("u:问")[0], "images": ["a"]}, *messages("a:答")]}, "not text alone: the turn has images"),
    ({"img_path": "a.png", "question": "问", "answer": "答"}, "not text alone: the record has img_path"),
])
def test_what_turns_hold_is_not_guessed(record, said):
    assert skipped(record, "sft").startswith(said)


TURNS = messages("u:问", "a:答")


@pytest.mark.parametrize("record,turns", [
    ({"conversations": str(TURNS)}, TURNS), ({"prompt": str(TURNS[:1]), "completion": str(TURNS[1:])}, TURNS),
    ({"messages": "[" + "\n ".join(map(str, TURNS)) + "]"}, TURNS),  # as numpy writes it
    ({"messages": [TURNS]}, TURNS), ({"dialogue": ["用户：问", "助手：答"]}, TURNS),
    ({"instruction": "Human: 问", "output": "Assistant: 答"}, TURNS), ("问：问\n答：答", TURNS),
    ({"conversation": [{"output": "答", "input": "问", "system": "诗人"}]}, messages("s:诗人", "u:问", "a:答")),
    ({"system": "诗人", "system_prompt": "短", "question": "问", "answer": "答"}, messages("s:诗人\n短", "u:问", "a:答")),
    ({"system": "诗人", "messages": messages("s:诗人", "u:问", "a:答")}, messages("s:诗人", "u:问", "a:答")),
    ({"messages": [TURNS[0], {**messages("a:<think>\n想\n</think>\n答")[0], "thinking": "想"}]},
     messages("u:问", "a:<think>\n想\n</think>\n答")),
    ({"question": "问", "answer": "答", "toxic": False, "skip": False}, TURNS),
    ({"system": "None", "instruction": "问", "input": "<无输入>", "output": "答"}, TURNS),
    ({"text": "USER: 问\nASSISTANT: 查\nFUNCTION RESPONSE: 晴\nASSISTANT: 晴天"}, messages("u:问", "a:查", "t:晴", "a:晴天")),
])
def test_turns_by_what_they_hold(record, turns):
    assert convert(record, "sft")[0] == turns


def test_nan_in_a_question_is_nothing():
    got, notes = convert({"instruction": "翻译", "input": "nan", "output": "答"}, "sft")
    assert got == messages("u:翻译", "a:答") and notes.cut == {"input that says nan": 1}
    assert skipped({"instruction": "翻译", "output": "NaN"}, "sft").startswith("empty")


def test_history_is_pairs():
    assert "pairs of question and answer" in skipped({"history": ["甲问", "乙问"], "question": "问", "answer": "答"}, "sft")
    assert "pairs of question and answer" in skipped({"history": [["甲", "乙", "丙"]], "question": "问", "answer": "答"}, "sft")


@pytest.mark.parametrize("record,leaves", [
    ({"instruction": "修船", "input": "木板", "output": "钉", "prompt": "指令：修船\n输入：木板\n输出：钉"}, "prompt"),
    ({"prompt": "问：" + POEMS[0] + POEMS[1], "completion": POEMS[0] + POEMS[1]}, None),
    ({"prompt": "一加一？\n答案：2", "completion": "2"}, None),
    ({"prompt": "一加一？\n正确答案是2", "completion": "2"}, None),
])
def test_a_question_with_its_answer_is_asked_about(record, leaves):
    said = skipped(record, "sft")
    assert said.startswith("the question holds its answer")
    if leaves:
        fields = re.search("--fields=([^ ]*)", said)[1]
        assert convert(record, "sft", [tuple(item.split(":")) for item in fields.split(",")])[0] == messages("u:修船\n木板", "a:钉")


def test_a_template_beside_its_question_is_asked_about():
    record = {"instruction": "修船", "prompt": "### 指令：修船\n### 回答：", "output": "钉"}
    advice = re.findall("--fields=([^ ]*)", skipped(record, "sft"))
    got = [convert(record, "sft", [tuple(item.split(":")) for item in each.split(",")])[0] for each in advice]
    assert got == [messages("u:修船", "a:钉"), messages("u:" + record["prompt"], "a:钉")]


def test_an_answer_that_goes_on_as_a_transcript():
    record = {"prompt": "Human: 问\n\nAssistant:", "completion": " 答\n\nHuman: 再问\n\nAssistant: 再答"}
    assert convert(record, "sft")[0] == messages("u:问", "a:答", "u:再问", "a:再答")
    record = {"prompt": "问：", "completion": "答：好"}
    assert convert(record, "sft")[0] == messages("u:问：", "a:答：好")


def test_pairs_of_a_role_and_words():
    record = {"messages": [["user", "问"], ["assistant", "答"], ["user", "再问"], ["assistant", "再答"]]}
    assert convert(record, "sft")[0] == messages("u:问", "a:答", "u:再问", "a:再答")


@pytest.mark.parametrize("record", [
    {"context": "船归磨坊主所有。", "question": "船归谁？", "answer": "磨坊主"},  # a passage holds the answer
    {"instruction": "这句话对吗？对还是错", "output": "错"},
])
def test_answers_may_stand_in_a_passage(record):
    assert convert(record, "sft")[0][-1]["content"] == record.get("answer", "错")


def test_messages_with_a_rejected_answer():
    record = {"messages": messages("u:甲", "a:乙", "u:问", "a:好"), "rejected_response": "坏"}
    assert convert(record, "pairs")[0] == {"prompt": messages("u:甲", "a:乙", "u:问"), "answers": ["好", "坏"]}


def test_a_prompt_that_its_answers_do_not_begin_with():
    record = {"prompt": "另一个", "chosen": messages("u:问", "a:好"), "rejected": messages("u:问", "a:坏")}
    assert "the prompt is not in what the answer begins with" in skipped(record, "pairs")


@pytest.mark.parametrize("more,said", [
    ({"chosen_score": 1, "rejected_score": 5.0}, "chosen_score is 1, and that of a chosen answer should be"),
    ({"label": 0}, "label is 0"),
    ({"flipped": True}, "flipped is True"), ({"is_right": False}, "is_right is False"),
    ({"rating": [3.0, 9.0]}, "rating is [3.0, 9.0]"), ({"status": "tie"}, "status is tie"),
    ({"better": "rejected"}, "is 'rejected'"),
    ({"chosen_tokens": 3, "rejected_tokens": 9}, None),
    ({"margin": 0, "score_chosen": 1.0, "score_rejected": 0.0, "id": 0}, None),
])
def test_marks_beside_two_answers(more, said):
    record = {"prompt": "问", "chosen": "好", "rejected": "坏", **more}
    if said:
        assert said in skipped(record, "pairs")
    else:
        assert convert(record, "pairs")[0]["answers"] == ["好", "坏"]


def test_any_number_in_answers_may_rank_them():
    answers = [{"text": "坏", "votes": 1, "id": 1}, {"text": "好", "votes": 9, "id": 2}]
    assert "does the votes in each answer rank them?" in skipped({"prompt": "问", "answers": answers}, "pairs")
    answers = [{"text": "好", "id": 1}, {"text": "坏", "id": 2}]
    assert convert({"prompt": "问", "answers": answers}, "pairs")[0]["answers"] == ["好", "坏"]


# ---------------------------------------------------------------- marks and speakers


@pytest.mark.parametrize("mark", ["loss", "loss_weight", "loss_scale", "weight", "train", "trainable"])
def test_answers_marked_by_any_name_are_not_learned(mark):
    turns = messages("u:问", "a:坏", "u:再来", "a:好")
    turns[1][mark] = 0.0
    turns[3][mark] = 1.0
    assert [m.get("weight") for m in convert({"messages": turns}, "sft")[0]] == [None, 0, None, None]


@pytest.mark.parametrize("value", ["off", -100, [0, 1]])
def test_a_weight_that_is_none_is_asked_about(value):
    turns = messages("u:问", "a:答")
    turns[1]["loss"] = value
    assert f"messages.loss is {value!r}" in skipped({"messages": turns}, "sft")


@pytest.mark.parametrize("mark,value", [("is_good", False), ("quality", 0), ("use", "0"), ("masked", True), ("bad", 1),
                                        ("learn", "no"), ("verdict", "incorrect"), ("评价", "差"), ("score", -1), ("toxic", True)])
def test_an_unknown_mark_is_asked_about(mark, value):
    turns = messages("u:问", "a:答")
    turns[1][mark] = value
    assert f"messages.{mark} is {value!r} beside an answer" in skipped({"messages": turns}, "sft")
    record = {"question": "问", "answer": "答", mark: value}
    said = skipped(record, "sft")
    # both pieces of advice work
    *drops, learns = re.findall("--fields=([^ ]*)", said)
    assert convert(record, "sft", [tuple(item.split(":")) for item in learns.split(",")])[0] == messages("u:问", "a:答")
    if value not in (True, 1):
        assert "thumbs down" in skipped(record, "sft", [tuple(item.split(":")) for item in drops[0].split(",")])


def test_a_list_of_marks_is_asked_about():
    said = skipped({"messages": messages("u:问", "a:坏"), "loss_mask": [0, 0]}, "sft")
    assert "loss_mask is [0, 0] beside an answer" in said and "as weight" in said


@pytest.mark.parametrize("name", ["id", "conversation_id", "index", "turn", "num_turns", "timestamp", "qid", "localId"])
def test_numbers_that_count_are_no_marks(name):
    assert convert({"question": "问", "answer": "答", name: 0, "lang": "no"}, "sft")[0] == messages("u:问", "a:答")


def test_doubts_are_noticed():
    said = skipped({"messages": [*messages("u:问"), {**TURNS[1], "metadata": {"weight": 0}}]}, "sft")
    assert "messages.metadata.weight is 0" in said
    record = {"prompt": "问", "completions": ["一", "二"], "labels": [True, False]}  # nothing to mark
    assert skipped(record, "sft").startswith("no answer")
    notes = convert({"question": "问", "answer": "答", "rating": 1, "set": "test"}, "sft")[1]
    assert sorted(notes.noticed) == ["rating beside answers, which are learned alike",
                                     "set that says test (--fields=…,split:set holds it out)"]


def test_speakers_of_a_transcript():
    text = "System: 诗人\nUser: 你好\nAssistant: 查\nTool: 晴\nAssistant: 晴天"
    assert convert({"text": text}, "sft")[0] == messages("s:诗人", "u:你好", "a:查", "t:晴", "a:晴天")
    said = skipped({"text": "User: 你好\nAssistant: 好\nNarrator: 他笑了\nUser: 再见\nAssistant: 再见"}, "sft")
    assert said.startswith("unknown speaker: who is 'Narrator'")
    note = "User: 你好\nAssistant: 好\nNote: 这是答案"
    assert convert({"text": note}, "sft")[0] == messages("u:你好", "a:好\nNote: 这是答案")


def test_who_speaks_in_most_transcripts_is_asked_about(tok_file):
    write("in/a.jsonl", [{"text": f"User: 第{i}问\nCritic: 不好\nAssistant: 第{i}答\nNote: 完"} for i in range(9)])
    with pytest.raises(SystemExit, match="who is Critic and Note[?]"):
        run(tok_file, kind="sft")
    write("in/a.jsonl", [{"text": f"User: 第{i}问\nAssistant: 第{i}答" + "\nNote: 完" * (i < 4)} for i in range(9)])
    assert run(tok_file, kind="sft").meta["kept"] == 9


# ---------------------------------------------------------------- tables

ROWS = [{"question": "甲问", "answer": "甲答"}, {"question": "乙问", "answer": "乙答"}]


@pytest.mark.parametrize("record", [
    {"columns": ["question", "answer"], "index": [0, 1], "data": [["甲问", "甲答"], ["乙问", "乙答"]]},  # orient="split"
    {"question": {"0": "甲问", "1": "乙问"}, "answer": {"0": "甲答", "1": "乙答"}},  # orient="columns"
    {"0": ROWS[0], "1": ROWS[1]},  # orient="index"
    {"schema": {"fields": [{"name": "question", "type": "string"}], "pandas_version": "1.4.0"}, "data": ROWS},
])
def test_tables_of_pandas(record):
    got = [convert(item, "sft")[0] for item in unfold(record, "sft")]
    assert got == [messages("u:甲问", "a:甲答"), messages("u:乙问", "a:乙答")]
    assert list(unfold({"text": ["甲", "乙"], "id": [0, 1]}, "text")) == [{"text": "甲", "id": 0}, {"text": "乙", "id": 1}]


def test_what_excel_adds(tok_file):
    with open("in/a.csv", "w", encoding="utf-8-sig", newline="") as f:
        f.write("sep=;\r\nquestion;answer;\r\n\"问_x000D_\n吗\";答;\r\n;;\r\nquestion;answer;\r\n;;\r\n")
    folder = run(tok_file, kind="sft", val_fraction=0.0)
    assert folder.meta["dropped"] == {"a row of names": 1} and folder.meta["kept"] == 1
    assert folder.rows()[0] == render_chat(folder.tok, messages("u:问\n吗", "a:答"))[0]


def test_numbers_of_rows_and_rows_of_names(tok_file):
    with open("in/a.csv", "w") as f:
        f.write(",question,answer\n0,甲问,甲答\n1,乙问,乙答\n")  # pandas' to_csv()
    assert run(tok_file, kind="sft").meta["kept"] == 2
    os.remove("in/a.csv")
    with open("in/a.json", "w") as f:
        json.dump([["question", "answer"], ["甲问", "甲答"], ["乙问", "乙答"]], f)
    meta = run(tok_file, kind="sft").meta
    assert meta["kept"] == 2 and meta["dropped"] == {"a row of names": 1}


def test_two_columns_of_one_name_stop_the_run(tok_file, capsys):
    with open("in/a.csv", "w") as f:
        f.write("text,id,text\n" + "".join(f"{poem},1,另一个\n" for poem in POEMS))
    with pytest.raises(SystemExit, match="two columns of one name"):
        run(tok_file)
    assert "columns 1, 3 are named text" in capsys.readouterr().err


def test_nulls_of_parquet_are_nothing(tok_file):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    calls = [[{"name": "weather", "arguments": {"city": "北京", "x": None}}], [{"name": "sum", "arguments": {"city": None, "x": 1}}]]
    turns = [[{"role": "user", "content": f"问{i}", "tool_calls": None},
              {"role": "assistant", "content": None, "tool_calls": call}] for i, call in enumerate(calls)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), "in/a.parquet")
    folder = run(tok_file, kind="sft", val_fraction=0.0)
    learned = sorted(json.loads(text.split("\n")[1])["arguments"] == {"x": 1} for text in folder.learned())
    assert learned == [False, True] and "null" not in "".join(folder.learned())


def test_a_folder_of_the_datasets_library(tok_file):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": POEMS})
    with pyarrow.ipc.new_stream("in/data-00000-of-00001.arrow", table.schema) as f:
        f.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        write(f"in/{name}", [{"description": "说明", "text": "不是语料的一段文字"}])
    os.mkdir("in/__MACOSX")
    write("in/__MACOSX/a.jsonl", [{"text": "不是语料的一段文字"}])
    assert run(tok_file).all_texts() == sorted(POEMS)


# ---------------------------------------------------------------- advice


@pytest.mark.parametrize("kind,make,learned", [
    ("text", lambda i: {"id": i, "type": "文本", "msg": f"嗯嗯好的{i}", "time": f"2024/10/4 11:{i:02d}"}, "嗯嗯好的7"),
    ("text", lambda i: {"story": f"第{i}天渔夫去了河边，天黑才回来。", "summary": f"短{i}"}, "第7天渔夫去了河边，天黑才回来。"),
    ("text", lambda i: {"text": f"这是第{i}个题目", "article": f"第{i}天渔夫去了河边，天黑才回来。"}, "这是第7个题目\n第7天渔夫去了河边，天黑才回来。"),
    ("sft", lambda i: {"question": f"第{i}问", "answer": "对", "passage": f"第{i}天渔夫去了河边，天黑才回来。"}, "对<|im_end|>"),
    ("sft", lambda i: {"messages": messages(f"u:第{i}问", "a:对"), "background": f"第{i}天渔夫去了河边，天黑才回来。"}, "对<|im_end|>"),
    ("sft", lambda i: {"question": f"第{i}问", "answer": f"答{i}", "label": i % 2}, "答7<|im_end|>"),
    ("sft", lambda i: {"question": f"第{i}问", "answer": f"答{i}", "response": f"另{i}"}, "另7<|im_end|>"),
    # a passage that holds the answer is none the less a passage; a short thought is a part of the answer
    ("sft", lambda i: {"question": f"第{i}问", "answer": "渔夫", "passage": f"第{i}天渔夫去了河边，天黑才回来。"}, "渔夫<|im_end|>"),
    ("sft", lambda i: {"question": "问", "answer": f"很长很长的一个答{i}", "CoT": f"想{i}"},
     "<think>\n想7\n</think>\n\n很长很长的一个答7<|im_end|>"),
    ("sft", lambda i: {"instruction": "只说诗句，不说别的", "messages": messages(f"u:第{i}问", f"a:很长很长的一个答{i}")},
     "很长很长的一个答7<|im_end|>"),
    ("sft", lambda i: {"messages": [{**TURNS[0], "file": f"第{i}天渔夫去了河边，天黑才回来。"}, *messages(f"a:答{i}")]},
     "答7<|im_end|>"),
    ("text", lambda i: {"paragraphs": [f"床前明月光{i}，", "疑是地上霜。"], "id": i}, "床前明月光7，\n疑是地上霜。"),
])
def test_advice_works(tok_file, capsys, kind, make, learned):
    """Whatever --fields a refusal proposes ends in a folder, and the first one learns what is meant."""
    write("in/a.jsonl", [make(i) for i in range(20)])
    with pytest.raises(SystemExit) as e:
        run(tok_file, kind=kind)
    advice = re.findall("--fields=([^ ]*)", capsys.readouterr().err + str(e.value))
    assert advice and not any("…" in fields for fields in advice)
    for i, fields in enumerate(dict.fromkeys(advice)):
        folder = run(tok_file, kind=kind, fields=fields, val_fraction=0.0)
        if i == 0:
            assert learned in (folder.learned() if kind == "sft" else folder.texts())


def test_categories_and_copies_are_no_loss(tok_file):
    write("in/a.jsonl", [{"question": f"第{i}问", "answer": "对", "category": "很长的类别名称", "source": "某某网站的数据",
                          "text": f"问：第{i}问\n答：对"} for i in range(20)])
    assert run(tok_file, kind="sft").meta["kept"] == 20


# ---------------------------------------------------------------- control tokens of other models


@pytest.mark.parametrize("marker", [
    "<|eot_id|>", "<|reserved_special_token_1|>", "<reserved_106>", "<EOS>", "[TOOL_CALLS]", "[/INST]", "<｜User｜>",
    "<0x0A>", "<|begin▁of▁sentence|>", "<end_of_utterance>", "<endoftext>", "<EOS_TOKEN>", "<TOKENS_UNUSED_1>",
    "[UNUSED_TOKEN_145]", "[|Human|]", "<[end▁of▁sentence]>", "<seed:bos>", "<fim_prefix>", "<image>", "[e~[", "<ctrl99>"])
def test_control_tokens_of_the_field(marker):
    assert find_markers(f"月{marker}光") == {marker: 1} and not find_markers("月<b>光</b> [1] <|> a < b | c > d")


def test_control_tokens_are_counted_and_cut_at(tok_file):
    texts = [{"text": f"<|im_start|>{poem}<|im_end|> <|im_start|>第{i}首{poem}<|im_end|>"} for i, poem in enumerate(POEMS)]
    write("in/a.jsonl", [*texts, {"text": POEMS[0] + "又</s>"}, {"text": "没有记号的一句"}])
    kept = run(tok_file, val_fraction=0.0)
    assert kept.meta["noticed"] == {"<|im_start|> in a text": 4, "<|im_end|> in a text": 4, "</s> in a text": 1}
    cut = run(tok_file, markers="cut", val_fraction=0.0)
    assert cut.texts() == sorted([*POEMS, *(f"第{i}首{poem}" for i, poem in enumerate(POEMS)), POEMS[0] + "又", "没有记号的一句"])
    write("in/a.jsonl", [{"prompt": "问<eoh>", "completion": "答</s>再答</s>"}])
    cut = run(tok_file, kind="sft", markers="cut", val_fraction=0.0)
    assert cut.learned() == ["答<|im_end|>"] and cut.meta["cut"] == {"words behind a marker": 1}


# ---------------------------------------------------------------- which files, which split


def test_links_patterns_and_several_paths(tok_file):
    os.makedirs("disk/wiki")
    write("disk/wiki/w.jsonl", [{"text": POEMS[0]}])
    write("in/a.jsonl", [{"text": POEMS[1]}])
    write("in/.hidden.jsonl", [{"text": "不读"}])
    os.symlink(os.path.abspath("disk/wiki"), "in/wiki")
    os.symlink(os.path.abspath("in"), "in/wiki/back")  # a circle
    assert run(tok_file, val_fraction=0.0).texts() == sorted(POEMS[:2])
    write("other.jsonl", [{"text": POEMS[2]}])
    assert run(tok_file, input="in/*.jsonl,other.jsonl", val_fraction=0.0).texts() == sorted(POEMS[1:3])
    with pytest.raises(SystemExit, match="--input=nothing/. does not exist"):
        run(tok_file, input="in,nothing/*")


@pytest.mark.parametrize("data,want", [
    ("\n\n".join(POEMS).encode("utf-32"), None),
    ("\n\n".join(POEMS).encode().decode("latin-1").encode(), "UTF-8 written twice"),
    ("id,text\n1,床前明月光\n".encode(), "a table in a .txt"), ("体育\t床前明月光\n".encode() * 9, "a table in a .txt"),
    ("\n".join(json.dumps([poem]) for poem in POEMS).encode(), None),
])
def test_bytes_of_a_txt(tok_file, data, want):
    with open("in/a.txt", "wb") as f:
        f.write(data)
    if want:
        with pytest.raises(SystemExit, match=want):
            run(tok_file)
    else:
        assert run(tok_file).all_texts() == sorted(POEMS)


def test_a_txt_of_json_lines(tok_file):
    write("in/a.txt", [{"text": poem} for poem in POEMS])
    assert run(tok_file).all_texts() == sorted(POEMS)
    with open("in/a.txt", "w") as f:
        json.dump([{"text": poem} for poem in POEMS], f, indent=1)
    with pytest.raises(SystemExit, match="JSON in a .txt"):
        run(tok_file)


def test_a_txt_of_an_article_a_line_is_asked_about(tok_file, capsys):
    articles = [poem * 30 + str(i) for i, poem in enumerate(POEMS * 5)]
    with open("in/a.txt", "w") as f:
        f.write("\n".join(articles))
    with pytest.raises(SystemExit, match="unclear where documents end"):
        run(tok_file)
    assert "--txt_document=line" in capsys.readouterr().err
    assert run(tok_file, txt_document="line").all_texts() == sorted(articles)
    assert "".join(run(tok_file, txt_document="file").texts()) in "\n".join(articles)


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_a_question_is_in_one_split(tok_file, kind):
    write("in/a.jsonl", [{"prompt": f"问{i % 40}", **({"completion": f"答{i}"} if kind == "sft" else
                                                    {"chosen": f"好{i}", "rejected": f"坏{i}"})} for i in range(400)])
    folder = run(tok_file, kind=kind, val_fraction=0.1)
    asked = [{re.search("问([0-9]+)", text)[1] for text in folder.texts(split)} for split in ("train", "val")]
    assert asked[1] and not asked[0] & asked[1] and folder.meta["noticed"] == {}
    # where the records say another thing, it is said
    write("in/a.jsonl", [{"prompt": f"问{i % 40}", "chosen": f"好{i}", "rejected": "坏", "split": "val" if i < 10 else "train"}
                         for i in range(400)])
    folder = run(tok_file, kind="pairs")
    assert folder.meta["noticed"] == {"held out, but with a question that is trained on": 10}


def test_one_question_alone_still_has_two_splits(tok_file):
    write("in/a.jsonl", [{"prompt": "问", "completion": f"答{i}"} for i in range(20)])
    folder = run(tok_file, kind="sft")
    assert len(folder.texts("val")) == 1 and folder.meta["noticed"] == {"held out, but with a question that is trained on": 1}


def test_file_names_that_are_no_utf8(tok_file):
    with open(b"in/\xb4\xba.jsonl", "w") as f:  # a name in GB18030
        f.write(json.dumps({"text": POEMS[0]}))
    write("in/b.jsonl", [{"text": POEMS[1]}])
    folder = run(tok_file, val_fraction=0.0)
    assert folder.texts() == sorted(POEMS[:2])
    assert sorted(map(os.fsencode, folder.meta["sources"])) == [b"in/b.jsonl", b"in/\xb4\xba.jsonl"]


def test_one_process_a_folder(tok_file):
    write("in/a.jsonl", [{"text": poem} for poem in POEMS])
    with pytest.raises(SystemExit, match="another process is preparing data/x"):
        with new_folder("data/x"):
            run(tok_file)
    assert os.listdir("data") == []
    run(tok_file)
    assert os.listdir("data") == ["x"]
