"""
Sums, a task in which thinking pays: data for every stage, and the rewards that check the answers.

    python -m recipes.sums                                  # data/raw/sums: text, conversations, prompts, tests
    python -m recipes.sums --worked=200 --out_dir=data/raw/sums-200
    python grpo.py config/sums_grpo.py --reward=recipes/sums.py:right --watch=recipes/sums.py:thinks

out: <out_dir>/tokenizer.model, text.jsonl (pretraining), sft.jsonl, prompts.jsonl (RL), dev.jsonl, test.jsonl

A thought takes one column a line from the right: what is left of both numbers, a 1 where one is carried (or borrowed),
and the digits that are done. Each line follows from the one before it by the same rule, however long the numbers are:

    713+586=?  →  71+58:9          3+6 = 9
                  7+5:99           1+8 = 9
                  0+0+1:299        7+5 = 12, carry 1
                  0+0:1299         what was carried
                  1299             said after </think>

Walks (--walks=0.2) are lines of the text that practise reading longer numbers, and add nothing: 47&25=?  4&2:75
0&0:4275  4275.

No training file holds a pair of numbers that stands in dev.jsonl or test.jsonl, in either order, nor any number of more
than `digits` digits to add or subtract. Settings were chosen on dev.jsonl alone.
"""
import json
import os
import random
import re
from dataclasses import dataclass
from typing import Literal

from configurator import Count, Share, Whole, check, run
from tokenizer import train_tokenizer


@dataclass
class Config:
    out_dir: str = "data/raw/sums"
    digits: Count = 4              # of the longest numbers
    thought: Literal["steps", "columns"] = "steps"  # columns: only the sum of each column, 3+6=9
    # pretraining text
    documents: Count = 20_000      # of ten sums each
    worked_text: Share = 0.25      # of the sums are worked line by line; the others just say the result
    walks: Share = 0.0             # of the lines walk through two numbers of up to `digits` + 2 digits, and add nothing
    # instruction data
    worked: Whole = 400            # conversations that think first
    plain: Whole = 600             # conversations that say the result at once
    # RL and tests
    prompts: Count = 10_000
    tests: Count = 500             # questions of `digits` digits in each of dev and test, and as many of one digit more
    seed: Whole = 1


QUESTION = re.compile("([0-9]+)([+-])([0-9]+)=")


# ---------------------------------------------------------------------------- sums and thoughts


def result(a, op, b):
    return a + b if op == "+" else a - b


def steps(a, op, b):
    """Lines of a thought, by one rule: take the last column off, write its digit in front of those that are done."""
    lines = []
    carry = 0
    done = ""
    while a or b or carry:
        if op == "+":
            carry, digit = divmod(a % 10 + b % 10 + carry, 10)
        else:
            column = a % 10 - b % 10 - carry
            carry = int(column < 0)
            digit = column % 10
        a //= 10
        b //= 10
        done = str(digit) + done
        carried = f"{op}1" if carry else ""
        lines.append(f"{a}{op}{b}{carried}:{done}")
    return lines


def columns(a, op, b):
    """Lines of a thought as on squared paper: each column alone, 7+5=12, the next one with the 1 that is carried."""
    lines = []
    carry = 0
    while a or b:
        x = a % 10
        y = b % 10
        carried = f"{op}1" if carry else ""
        value = result(x, op, y + carry) if op == "-" else x + y + carry
        if op == "-":
            carry = int(value < 0)
            value %= 10
        else:
            carry = value // 10
        lines.append(f"{x}{op}{y}{carried}={value}")
        a //= 10
        b //= 10
    return lines


def walk(a, b):
    """The lines of steps() with & for an operator, which adds nothing: 47&25=?  4&2:75  0&0:4275  4275."""
    lines = [f"{a}&{b}=?"]
    done = ""
    while a or b:
        done = f"{a % 10}{b % 10}{done}"
        a //= 10
        b //= 10
        lines.append(f"{a}&{b}:{done}")
    return "\n".join([*lines, done])


THOUGHTS = {"steps": steps, "columns": columns}


# ---------------------------------------------------------------------------- rewards


def said(answer):
    """The number behind the thinking, as it is written; None where there is none, or a thought without an end."""
    if "<think>" in answer and "</think>" not in answer:
        return None
    words = answer.rsplit("</think>", 1)[-1].strip()
    return words if re.fullmatch(r"[0-9]+", words) else None


def right(prompt, answer):
    """1 for the right number, 0.1 for another number, else 0. The prompt may hold the chat's roles: search, no match."""
    number = said(answer)
    if number is None:
        return 0.0
    a, op, b = QUESTION.search(prompt).groups()
    return 1.0 if number == str(result(int(a), op, int(b))) else 0.1


def thinks(prompt, answer):
    """1 where an answer thinks first: to follow, not to train on."""
    return float("</think>" in answer)


# ---------------------------------------------------------------------------- files


def draw(rng, digits, exact=False):
    """Draw (a, op, b), numbers of up to `digits` digits (exact: both of so many); in a-b the larger one comes first."""
    numbers = []
    for _ in range(2):
        length = digits
        if not exact:
            length = rng.randint(1, digits)
        low = 10 ** (length - 1) if length > 1 else 0
        numbers.append(rng.randrange(low, 10 ** length))
    op = rng.choice("+-")
    if op == "-":
        numbers.sort(reverse=True)
    return numbers[0], op, numbers[1]


def pair(a, op, b):
    """What makes a sum known: its two numbers, in whatever order."""
    return min(a, b), max(a, b)


def chat(a, op, b, cfg, think):
    answer = str(result(a, op, b))
    if think:
        thought = "\n".join(THOUGHTS[cfg.thought](a, op, b))
        answer = f"<think>\n{thought}\n</think>\n{answer}"
    return {"messages": [
        {"role": "user", "content": f"{a}{op}{b}=?"},
        {"role": "assistant", "content": answer}]}


def text_line(rng, sums, cfg):
    """One piece of the pretraining text: a column alone, a sum, or one that is worked."""
    if rng.random() < 0.1:
        x, y, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
        return f"{x}+{y}+{carry}={x + y + carry}"
    if rng.random() < cfg.walks:
        a, _, b = draw(rng, cfg.digits + 2)
        return walk(a, b)
    a, op, b = next(sums)
    if rng.random() < cfg.worked_text:
        # without the tags of a chat: those are left to the conversations
        thought = "\n".join(THOUGHTS[cfg.thought](a, op, b))
        return f"{a}{op}{b}=?\n{thought}\n{result(a, op, b)}"
    return f"{a}{op}{b}={result(a, op, b)}"


def unseen(rng, held_out, digits, exact):
    """Endless sums, none of them held out."""
    while True:
        question = draw(rng, digits, exact)
        if pair(*question) not in held_out:
            yield question


def write(cfg, name, records):
    with open(os.path.join(cfg.out_dir, name), "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record) + "\n")


def main(cfg):
    check(2 <= cfg.digits <= 8, f"digits={cfg.digits}: wanted 2 to 8")
    os.makedirs(cfg.out_dir, exist_ok=True)
    # the tests first, always the same ones: all else is drawn around them
    held_out = set()
    for number, name in enumerate(("dev", "test")):
        rng = random.Random(number)
        records = []
        for digits in (cfg.digits, cfg.digits + 1):
            sums = unseen(rng, held_out, digits, exact=True)
            for _ in range(cfg.tests):
                a, op, b = next(sums)
                held_out.add(pair(a, op, b))
                records.append({"digits": digits, "prompt": f"{a}{op}{b}=?", "answer": str(result(a, op, b))})
        write(cfg, f"{name}.jsonl", records)

    rng = random.Random(f"sums {cfg.seed}")
    mixed = unseen(rng, held_out, cfg.digits, exact=False)
    longest = unseen(rng, held_out, cfg.digits, exact=True)
    # a vocabulary that knows the digits and the tags
    examples = [chat(*next(longest), cfg, think=True)["messages"] for _ in range(2_000)]
    texts = [question["content"] + "\n" + answer["content"] for question, answer in examples]
    train_tokenizer(texts, os.path.join(cfg.out_dir, "tokenizer.model"), vocab_size=448)
    # half of the text's sums are of the longest numbers: of short ones there are few
    both = (next(rng.choice((mixed, longest))) for _ in iter(int, 1))
    documents = ("\n".join(text_line(rng, both, cfg) for _ in range(10)) for _ in range(cfg.documents))
    write(cfg, "text.jsonl", ({"text": text} for text in documents))
    conversations = [chat(*next(longest), cfg, think=i < cfg.worked) for i in range(cfg.worked + cfg.plain)]
    rng.shuffle(conversations)
    write(cfg, "sft.jsonl", conversations)
    write(cfg, "prompts.jsonl", ({"prompt": "{}{}{}=?".format(*next(longest))} for _ in range(cfg.prompts)))
    print(f"{cfg.out_dir}: {cfg.documents:,} documents of ten sums, {cfg.worked} + {cfg.plain} conversations, "
          f"{cfg.prompts:,} prompts, {len(held_out):,} pairs held out")


if __name__ == "__main__":
    run(main, Config)
