"""readers/: records as published sets write them, and what is refused."""
import json

import pytest

from prepared import messages
from readers.account import Drop, Skip
from readers.schemas import convert


PROMPT = messages("u:问")
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"day": 1}}\n</tool_call>'


@pytest.mark.parametrize("record,turns", [
    ({"id": "7", "data": ["问", "答", "再问", "再答"]}, ["u:问", "a:答", "u:再问", "a:再答"]),
    ({"conversation": [{"human": "问", "assistant": "答"}, {"human": "再问", "assistant": "再答"}]},
     ["u:问", "a:答", "u:再问", "a:再答"]),
    ({"instruction": "谁？", "context": "船归磨坊主。", "response": "磨坊主。", "category": "qa"}, ["u:谁？\n船归磨坊主。", "a:磨坊主。"]),
    ({"instruction": "回答问题。", "question": "谁？", "answer": "我。"}, ["u:回答问题。\n谁？", "a:我。"]),
    ({"kind": "NLI", "input": "对吗？", "target": "对"}, ["u:对吗？", "a:对"]),
    ({"question": "0+1=?", "answer": 1}, ["u:0+1=?", "a:1"]),
    ({"question": "1-1=?", "answer": 0}, ["u:1-1=?", "a:0"]),
    ({"history": "[]", "question": "问", "answer": "答"}, ["u:问", "a:答"]),
    ({"history": '[["甲", "乙"]]', "question": "问", "answer": "答"}, ["u:甲", "a:乙", "u:问", "a:答"]),
    ({"prompt": "问", "completion": "答", "label": True}, ["u:问", "a:答"]),
    ({"prompt": "问", "completion": "答", "label": 1}, ["u:问", "a:答"]),
    ({"instruction": "问", "input": float("nan"), "output": "答"}, ["u:问", "a:答"]),
    ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "问"}]},
                   {"role": "assistant", "content": [{"type": "output_text", "text": "答"}]}]}, ["u:问", "a:答"]),
    ({"prompt": messages("u:问"), "completion": messages("a:答")}, ["u:问", "a:答"]),
    ({"messages": '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]'}, ["u:问", "a:答"]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "问"}]}, *messages("a:答")]}, ["u:问", "a:答"]),
    ({"messages": [{"role": "developer", "content": "诗人"}, *messages("u:问", "a:答")]}, ["s:诗人", "u:问", "a:答"]),
    # transcripts in one text
    ({"instruction": "Human:你好\nAssistant:你好，请说\nHuman:吃什么？\nAssistant:", "input": "", "output": "面"},
     ["u:你好", "a:你好，请说", "u:吃什么？", "a:面"]),
    ({"text": "### Human: 问### Assistant: 答"}, ["u:问", "a:答"]),
    ({"prompt": "说说 Human: 和 Assistant: 的意思", "response": "答"}, ["u:说说 Human: 和 Assistant: 的意思", "a:答"]),
    # what a model thinks, and the tools it calls
    ({"messages": [*messages("u:1+1？"), {"role": "assistant", "content": "2", "reasoning_content": "先想"}]},
     ["u:1+1？", "a:<think>\n先想\n</think>\n\n2"]),
    ({"question": "1+1？", "reasoning": "先想", "answer": "2"}, ["u:1+1？", "a:<think>\n先想\n</think>\n\n2"]),
    ({"messages": [*messages("u:天气？"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                   {"role": "tool", "content": "晴"}, *messages("a:晴天")]}, ["u:天气？", f"a:{CALLED}", "t:晴", "a:晴天"]),
    ({"messages": [*messages("u:天气？"), {"role": "assistant", "content": "看看", "tool_calls": [CALL, CALL]}]},
     ["u:天气？", f"a:看看\n{CALLED}\n{CALLED}"]),
    ({"conversations": [{"from": "human", "value": "天气？"},
                        {"from": "function_call", "value": '{"name": "weather", "arguments": {"day": 1}}'},
                        {"from": "observation", "value": "晴"}, {"from": "gpt", "value": "晴天"}],
      "tools": '[{"name": "weather"}]'},
     ['s:<tools>\n{"name": "weather"}\n</tools>', "u:天气？", f"a:{CALLED}", "t:晴", "a:晴天"]),
    ({"messages": messages("s:诗人", "u:问", "a:答"), "tools": [{"name": "甲"}, {"name": "乙"}]},
     ['s:诗人\n\n<tools>\n{"name": "甲"}\n{"name": "乙"}\n</tools>', "u:问", "a:答"]),
    ({"messages": messages("u:问", "a:答"), "tools": [{"type": "function", "function": {"name": "甲"}}, {"name": "乙"}]},
     ['s:<tools>\n{"name": "甲"}\n{"name": "乙"}\n</tools>', "u:问", "a:答"]),
])
def test_conversation_schemas_of_the_field(record, turns):
    assert convert(record, "sft")[0] == messages(*turns)


def test_tool_calls_can_be_parsed_back():
    record = {"messages": [*messages("u:天气？"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    turns = convert(record, "sft")[0]
    first, call, last = turns[1]["content"].split("\n")
    assert (first, last) == ("<tool_call>", "</tool_call>")
    assert json.loads(call) == {"name": "weather", "arguments": {"day": 1}}


@pytest.mark.parametrize("field", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0}, {"weight": "0"}])
def test_answers_of_weight_zero_are_kept_but_not_learned(field):
    bad = {"role": "assistant", "content": "坏答", **field}
    record = {"messages": [*messages("u:问"), bad, *messages("u:再来", "a:好答")]}
    got = convert(record, "sft")[0]
    assert got[1] == {"role": "assistant", "content": "坏答", "weight": 0} and got[3] == messages("a:好答")[0]
    record["messages"] = record["messages"][:2]
    with pytest.raises(Drop, match="no answer to learn"):
        convert(record, "sft")


@pytest.mark.parametrize("record,prompt,answers", [
    ({"instruction": "问", "input": "", "output": ["好", "中", "坏"], "history": []}, PROMPT, ["好", "中", "坏"]),
    ({"prompt": "问", "chosen_messages": messages("u:问", "a:好"), "rejected_messages": messages("u:问", "a:坏")}, PROMPT,
     ["好", "坏"]),
    ({"system": "", "history": [], "question": "问", "response_chosen": "好", "response_rejected": "坏"}, PROMPT,
     ["好", "坏"]),
    ({"prompt": "问", "messages": messages("u:问", "a:好"), "chosen": messages("u:问", "a:好"),
      "rejected": messages("u:问", "a:坏"), "score_chosen": 9.0}, PROMPT, ["好", "坏"]),
    ({"system": "诗人", "chosen": messages("u:问", "a:好"), "rejected": messages("u:问", "a:坏")}, messages("s:诗人", "u:问"),
     ["好", "坏"]),
    ({"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"}, PROMPT, ["好", "坏"]),
    ({"prompt": "问", "chosen": "好", "rejected": ["坏", "更坏"]}, PROMPT, ["好", "坏"]),
    ({"conversations": [{"from": "human", "value": "问"}], "chosen": {"value": "好"}, "rejected": {"value": "坏"}}, PROMPT,
     ["好", "坏"]),
    ({"prompt": "问", "chosen": "[1, 2]", "rejected": '{"a": 1}'}, PROMPT, ["[1, 2]", '{"a": 1}']),
])
def test_preference_schemas_of_the_field(record, prompt, answers):
    assert convert(record, "pairs")[0] == {"prompt": prompt, "answers": answers}


@pytest.mark.parametrize("record,kind,said", [
    ({"story": "很久以前", "instruction": {"words": []}, "summary": "短", "source": "x"}, "text",
     "the fields are story, instruction, summary, source; wanted text or content"),
    ({"prompt": "问", "completion": "答"}, "text", "the fields are prompt, completion"),
    ({"ask": "问", "reply": "答"}, "sft", "the fields are ask, reply; wanted messages, or a question (instruction, "),
    ({"question": "问", "answer": "甲", "response": "乙"}, "sft",
     "answer and response differ: --fields=question:question,answer:response learns response"),
    ({"instruction": "问", "output": ["好", "坏"]}, "sft", "output holds 2, best first? Then --kind=pairs ranks them"),
    ({"prompt": "问", "completion": "答", "label": False}, "pairs",
     "thumbs up or down of one answer: --kind=sft learns the good ones"),
    ({"prompt": "问", "good": "好", "bad": "坏"}, "pairs", "--fields=chosen:…,rejected:…"),
    ({"question": "问", "answers": {"text": ["答"]}}, "sft", "no answer: the fields are question, answers; wanted"),
    ({"version": 1, "data": [{"text": "诗"}]}, "text", "(are the records in data? Write them out: jq -c"),
    ({"ask": "问"}, "prompts", "the fields are ask; wanted messages, or one of instruction, prompt"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "sft",
     "messages holds image_url"),
    ({"history": "甲", "question": "问", "answer": "答"}, "sft", None),
    ({"messages": [{"content": "问"}]}, "sft", "the fields are content; wanted one of user, human"),
    ({"text": {"a": 1}}, "text", "wanted text, got {'a': 1}"),
    ({"title": "题", "sections": ["甲"]}, "text", "sections holds '甲', wanted objects with title and content"),
    (7, "text", "wanted an object with named fields, got 7"),
    (None, "sft", "wanted an object with named fields, got None"),
    ("诗", "sft", "the record is a text; wanted messages"),
    ([1, 2], "pairs", "the record is a list"),
])
def test_what_cannot_be_used_says_what_is_there_and_what_is_wanted(record, kind, said):
    if said is None:
        assert convert(record, kind)[0]
        return
    with pytest.raises(Skip) as e:
        convert(record, kind)
    assert said in str(e.value)
    for python in ("object has no", "unpack", "subscriptable", "NoneType", "expected"):
        assert python not in str(e.value)


@pytest.mark.parametrize("record,answers", [
    ({"prompt": "问", "output": ["中", "坏", "好"], "ranks": [2, 3, 1]}, ["好", "中", "坏"]),
    ({"prompt": "问", "response": ["中", "坏", "好"], "order": [2, 0, 1]}, ["好", "中", "坏"]),
    ({"prompt": "问", "responses": ["坏", "好"], "scores": [0.1, 0.9]}, ["好", "坏"]),
    ({"prompt": "问", "chosen": ["好"], "rejected": ["坏"]}, ["好", "坏"]),
    ({"prompt": "Human: 问\nAssistant:", "chosen": "Human: 问\nAssistant: 好", "rejected": "Human: 问\nAssistant: 坏"},
     ["好", "坏"]),
])
def test_ranked_answers_in_other_shapes(record, answers):
    assert convert(record, "pairs")[0] == {"prompt": messages("u:问"), "answers": answers}


@pytest.mark.parametrize("record,kind,reason", [
    # numbers beside answers: is their order the order of the list?
    ({"prompt": "问", "output": ["坏", "好"], "stars": [1, 5]}, "pairs", "no ranking"),
    ({"prompt": "问", "output": [{"text": "坏", "score": 1}, {"text": "好", "score": 5}]}, "pairs", "no ranking"),
    ({"prompt": "问", "responses": ["坏", "好"], "ranks": [True, False]}, "pairs", "no ranking"),
    # a question that ends with an answer, and another one
    ({"prompt": messages("u:问", "a:一"), "completion": "二"}, "sft", "two answers"),
    # answers that are objects
    ({"question": "问", "answer": [{"text": "好", "score": 1}, {"text": "坏", "score": 0}]}, "sft", "several answers"),
    ({"question": "问", "answer": {"text": ["一", "二"], "answer_start": [0, 4]}}, "sft", "several answers"),
    ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "parts": ["答"]}]}, "sft", "wrong type"),
    # what a model of text cannot see
    ({"image": "a.jpg", "conversations": messages("u:这是什么？", "a:猫")}, "sft", "not text alone"),
    ({"prompt": "问", "completion": "答", "label": 0.0}, "sft", "thumbs down"),
    ({"prompt": "问", "completion": "答", "label": -1}, "sft", "thumbs down"),
])
def test_what_is_unclear_is_not_learned(record, kind, reason):
    with pytest.raises(Skip) as e:
        convert(record, kind)
    assert e.value.reason == reason


@pytest.mark.parametrize("record,turns", [
    ({"context": ["段一", "段二"], "question": "问", "answer": "答"}, ["u:问\n段一\n段二", "a:答"]),
    ({"question": "问", "answer": {"text": ["答"], "answer_start": [2]}}, ["u:问", "a:答"]),
    ({"text": "System: 诗人\nQ: 问\nA: 答"}, ["s:诗人", "u:问", "a:答"]),
    ({"text": "### Instruction:\n问\n### Response:\n答"}, ["u:问", "a:答"]),
    ({"text": "问：一加一？\n答：二"}, ["u:一加一？", "a:二"]),
    ({"messages": messages("u:问", "a:查", "t:", "a:答")}, ["u:问", "a:查", "t:", "a:答"]),
    ({"messages": [*messages("u:问", "a:查"), {"role": "tool", "content": [{"city": "北京"}]}, *messages("a:答")]},
     ["u:问", "a:查", 't:[{"city": "北京"}]', "a:答"]),
    ({"messages": messages("u:问", "a:答"), "answer": "另一个"}, ["u:问", "a:答"]),
    # a question that quotes a dialogue
    ({"instruction": "Human: 问\nAssistant: 一", "output": "二"}, ["u:Human: 问\nAssistant: 一", "a:二"]),
    ({"instruction": "user: root\nbot: on", "output": "好"}, ["u:user: root\nbot: on", "a:好"]),
])
def test_conversations_in_other_shapes(record, turns):
    assert convert(record, "sft")[0] == messages(*turns)


def test_answers_that_are_numbers_do_not_rank_themselves():
    record = {"question": "一加一？", "answer": ["2", "3"]}
    assert convert(record, "pairs")[0] == {"prompt": messages("u:一加一？"), "answers": ["2", "3"]}


@pytest.mark.parametrize("record,kind,turns", [
    ({"instruction": "Q: 哪个是水果？\nA: 苹果\nB: 石头", "output": "A"}, "sft", ["u:Q: 哪个是水果？\nA: 苹果\nB: 石头", "a:A"]),
    ({"question": "问：哪个是水果？\nA：苹果\nB：石头\n答：", "answer": "A"}, "sft", ["u:哪个是水果？\nA：苹果\nB：石头", "a:A"]),
    ({"prompt": "Q: 哪个？\nA: 甲\nB: 乙"}, "prompts", ["u:Q: 哪个？\nA: 甲\nB: 乙"]),
    ({"input": "问：一加一？\n答：三\n对吗？", "output": "错"}, "sft", ["u:问：一加一？\n答：三\n对吗？", "a:错"]),
    ({"instruction": "Human:看\nResponse: 200\nA: 甲\nAssistant:", "output": "好"}, "sft", ["u:看\nResponse: 200\nA: 甲", "a:好"]),
    ({"text": "### Human: 你好### Assistant: 好\nQ: 甲\nA: 乙"}, "sft", ["u:你好", "a:好\nQ: 甲\nA: 乙"]),
    ({"prompt": "问", "response": [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]}, "sft", ["u:问", "a:一二"]),
    ({"images": [None], "image": {"bytes": None}, "messages": messages("u:问", "a:答")}, "sft", ["u:问", "a:答"]),
])
def test_what_only_looks_like_turns_stays_as_it_is(record, kind, turns):
    assert convert(record, kind)[0] == messages(*turns)


@pytest.mark.parametrize("prompt,chosen,rejected", [
    ("你好", "你好！有什么事？", "走开"),
    ("写常见问题", "问：能退货吗？\n答：能。", "问：能退货吗？\n答：不能。"),
    ("写常见问题", "Q: 能退货吗？\nA: 能。", "不会"),
])
def test_answers_are_not_cut(prompt, chosen, rejected):
    got = convert({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "pairs")[0]
    assert got == {"prompt": messages(f"u:{prompt}"), "answers": [chosen, rejected]}
    chosen, rejected = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in (chosen, rejected)]
    assert convert({"chosen": chosen, "rejected": rejected}, "pairs")[0] == got


@pytest.mark.parametrize("record", [
    {"prompt": "问", "output": ["坏", "好"], "is_best": [False, True]},
    {"prompt": "问", "output": ["坏", "好"], "score": ["1", "5"]},
    {"prompt": "问", "output": [{"text": "坏", "reward": 0.1}, {"text": "好", "reward": 0.9}]},
    {"prompt": "问", "output": ["坏", "好"], "chosen": 1, "rejected": 0},
])
def test_ranks_of_other_types_are_not_ignored(record):
    with pytest.raises(Skip, match="no ranking"):
        convert(record, "pairs")
