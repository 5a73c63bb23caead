"""Sums: thoughts worked by hand, rewards, the calculator, held-out questions, pass@k against counting."""
import itertools
import json
import random

import pytest

from recipes import sums
from recipes.sums_eval import pass_at


@pytest.mark.parametrize("question, columns", [
    ((4713, "+", 2586), "3+6=9 1+8=9 7+5=12 4+2+1=7"),
    ((95, "+", 7), "5+7=12 9+0+1=10"),
    ((503, "-", 498), "3-8=5 0-9-1=0 5-4-1=0"),
    ((8, "-", 8), "8-8=0")])
def test_a_thought_is_the_sum_by_hand(question, columns):
    assert sums.columns(*question) == columns.split()


def test_the_last_digits_of_a_thought_are_the_result():
    """Whatever the numbers: read from the last line to the first, and in front the carry of the last."""
    rng = random.Random(0)
    for _ in range(200):
        a, op, b = sums.draw(rng, 6)
        values = [line.split("=")[1] for line in reversed(sums.columns(a, op, b))]
        digits = "".join([*values[:1], *(value[-1] for value in values[1:])])
        assert int(digits or 0) == sums.result(a, op, b) >= 0


@pytest.mark.parametrize("answer, reward", [
    ("7299", 1.0), ("<think>\nanything\n</think>\n7299", 1.0), ("7298", 0.1), ("07299", 0.1), ("7299.", 0.0), ("", 0.0),
    ("<think>\n7299", 0.0), ("7299\n7299", 0.0)])
def test_reward_is_for_the_number_alone(answer, reward):
    assert sums.right("user\n4713+2586=?\nassistant\n", answer) == reward
    assert sums.right("4713-2586=?", answer) <= 0.1
    assert sums.thinks("", answer) == ("</think>" in answer)


def test_the_calculator_answers_calls_and_each_costs():
    call = sums.call("4713+2586")
    assert sums.calculator(call) == "7299"
    assert sums.calculator("7299") is None
    assert sums.calculator(call.replace("4713+", "4713*")) == "error"
    assert sums.calculator("<tool_call>\n{\n</tool_call>") == "error"
    whole = f"{call}<|im_end|>\n<|im_start|>tool\n7299<|im_end|>\n<|im_start|>assistant\n7299"
    assert sums.priced("4713+2586=?", whole) == pytest.approx(0.5)


def test_no_question_of_the_tests_is_in_a_training_file(tmp_path):
    sums.main(sums.Config(out_dir=str(tmp_path), digits=2, documents=300, worked=20, plain=20, prompts=300, tests=50))
    files = {path.name: path.read_text().splitlines() for path in tmp_path.rglob("*.jsonl")}
    tests = [json.loads(line) for name in ("dev", "test", "tools-test") for line in files.pop(f"{name}.jsonl")]
    held_out = set()
    for record in tests:
        a, op, b = sums.QUESTION.search(record["prompt"]).groups()
        assert record["answer"] == str(sums.result(int(a), op, int(b)))
        assert max(len(a), len(b)) == record["digits"]
        if record["digits"] > 1:
            held_out |= {(a, b), (b, a)}
    seen = 0
    for name, lines in files.items():
        for line in lines:
            for a, _, b in sums.QUESTION.findall(line):
                seen += 1
                assert (a, b) not in held_out, f"{name}: {line}"
                assert len(a) <= 2 and len(b) <= 2
    assert seen > 1000


def test_pass_at_k_counts_the_draws():
    """The unbiased estimator is the share of all draws of k among n answers that hold a right one."""
    answers = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        draws = list(itertools.combinations(answers, k))
        assert pass_at(k, 5, 2) == pytest.approx(sum(map(any, draws)) / len(draws))
