"""Sums: thoughts worked by hand, rewards, held-out questions, pass@k against counting."""
import itertools
import json
import random

import pytest

from recipes import sums
from recipes.sums_eval import pass_at


@pytest.mark.parametrize("question, steps, columns", [
    ((4713, "+", 2586), "471+258:9 47+25:99 4+2+1:299 0+0:7299", "3+6=9 1+8=9 7+5=12 4+2+1=7"),
    ((95, "+", 7), "9+0+1:2 0+0+1:02 0+0:102", "5+7=12 9+0+1=10"),
    ((503, "-", 498), "50-49-1:5 5-4-1:05 0-0:005", "3-8=5 0-9-1=0 5-4-1=0"),
    ((8, "-", 8), "0-0:0", "8-8=0"),
])
def test_a_thought_is_the_sum_by_hand(question, steps, columns):
    assert sums.steps(*question) == steps.split()
    assert sums.columns(*question) == columns.split()


def test_every_step_is_the_rule_on_the_line_before_it():
    """What lines have in common, whatever the numbers: the last line's digits are the result."""
    rng = random.Random(0)
    for _ in range(200):
        a, op, b = sums.draw(rng, 6)
        lines = sums.steps(a, op, b)
        done = lines[-1].split(":")[1] if lines else "0"
        assert int(done) == sums.result(a, op, b) >= 0
        for before, line in itertools.pairwise(lines):
            assert line.split(":")[1][1:] == before.split(":")[1]


@pytest.mark.parametrize("answer, reward", [
    ("7299", 1.0), ("<think>\nanything\n</think>\n7299", 1.0), ("7298", 0.1), ("07299", 0.1), ("7299.", 0.0), ("", 0.0),
    ("<think>\n7299", 0.0), ("7299\n7299", 0.0)])
def test_reward_is_for_the_number_alone(answer, reward):
    assert sums.right("user\n4713+2586=?\nassistant\n", answer) == reward
    assert sums.right("4713-2586=?", answer) <= 0.1
    assert sums.thinks("", answer) == ("</think>" in answer)


def test_no_question_of_the_tests_is_in_a_training_file(tmp_path):
    sums.main(sums.Config(out_dir=str(tmp_path), digits=2, documents=300, worked=20, plain=20, prompts=300, tests=50))
    files = {path.name: path.read_text().splitlines() for path in tmp_path.glob("*.jsonl")}
    tests = [json.loads(line) for name in ("dev.jsonl", "test.jsonl") for line in files.pop(name)]
    held_out = set()
    for record in tests:
        a, op, b = sums.QUESTION.search(record["prompt"]).groups()
        assert record["answer"] == str(sums.result(int(a), op, int(b)))
        assert max(len(a), len(b)) == record["digits"]
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
