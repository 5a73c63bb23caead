"""
Sums, a task in which thinking helps, or a tool: data for every stage, rewards that check the answers, a calculator.

    python -m recipes.sums                                  # data/raw/sums: text, conversations, prompts, tests
    python grpo.py config/sums_grpo.py --reward=recipes/sums.py:right --watch=recipes/sums.py:thinks
    bash runs/calculator.sh                                 # --environment=recipes/sums.py:calculator

out: <out_dir>/tokenizer.model, text.jsonl (pretraining); sft.jsonl, prompts.jsonl, dev.jsonl, test.jsonl (thinking);
     tools-sft.jsonl, tools-prompts/, tools-test.jsonl (the calculator; numbers of 1 to `digits` digits)

A thought goes column by column from the right, as children do on squared paper: a line needs two digits and a carry.

    713+586=?  →  3+6=9
                  1+8=9
                  7+5=12           if the column before had a carry: 7+5+1=13
                  1299             the answer, after </think>

No training file contains two numbers that are in a test, in either order (except those of one digit, of which there are
too few), nor a number of more than `digits` digits. The tests were drawn after the last setting had been chosen.
"""
import json
import os
import random
import re
from dataclasses import dataclass

from configurator import Count, Share, Whole, check, run
from readers.calls import call_tools
from tokenizer import train_tokenizer


@dataclass
class Config:
    out_dir: str = "data/raw/sums"
    digits: Count = 4              # in the longest numbers
    # pretraining text
    documents: Count = 20_000      # of ten sums each
    worked_text: Share = 0.6       # share of sums that are worked out line by line; the others just have the result
    # instruction data
    worked: Whole = 400            # conversations that think first
    plain: Whole = 600             # conversations that say the result at once
    calls: Whole = 300             # conversations that ask the calculator, of 1,000 in tools-sft.jsonl
    # RL and tests
    prompts: Count = 10_000
    tests: Count = 500             # of each number of digits in dev, test and tools-test
    seed: Whole = 1


QUESTION = re.compile("([0-9]+)([+-])([0-9]+)=")


# ---------------------------------------------------------------------------- sums and thoughts


def result(a, op, b):
    return a + b if op == "+" else a - b


def columns(a, op, b):
    """Return the lines of a thought, one for each column, with the 1 that the column before has carried or borrowed."""
    lines = []
    carry = 0
    while a or b:
        x = a % 10
        y = b % 10
        carried = f"{op}1" if carry else ""
        value = result(x, op, y) + result(0, op, carry)  # -10 to 19; below 0 or above 9 the next column gets a 1
        lines.append(f"{x}{op}{y}{carried}={value if op == '+' else value % 10}")
        carry = int(not 0 <= value <= 9)
        a //= 10
        b //= 10
    return lines


# ---------------------------------------------------------------------------- rewards, and a tool


def said(answer):
    """The number after thoughts and calls, as text; None where there is none, or a thought does not end."""
    last_turn = answer.rsplit("assistant\n", 1)[-1]
    if "<think>" in last_turn and "</think>" not in last_turn:
        return None
    words = last_turn.rsplit("</think>", 1)[-1].strip()
    return words if re.fullmatch(r"[0-9]+", words) else None


def right(prompt, answer):
    """1 for the right number, 0.1 for another number, else 0. The prompt may contain more than the question."""
    number = said(answer)
    if number is None:
        return 0.0
    a, op, b = QUESTION.search(prompt).groups()
    return 1.0 if number == str(result(int(a), op, int(b))) else 0.1


def thinks(prompt, answer):
    """1 where an answer thinks first: for --watch, not to train on."""
    return float("</think>" in answer)


def calls(prompt, answer):
    """How often an answer calls the calculator: for --watch, not to train on."""
    return float(answer.count("<tool_call>"))


def priced(prompt, answer):
    """right(), less 0.5 for each call."""
    return right(prompt, answer) - 0.5 * calls(prompt, answer)


def call(expression):
    """A call of the calculator as the model writes it."""
    return call_tools([{"name": "calculator", "arguments": {"expression": expression}}])


def called(text):
    """The expression in a turn's call of the calculator; "" where the call cannot be read, None without a call."""
    if "<tool_call>" not in text:
        return None
    found = re.search(r"<tool_call>\n(.*)\n</tool_call>", text)
    try:
        return str(json.loads(found[1])["arguments"]["expression"])
    except (TypeError, ValueError, KeyError):
        return ""


def calculator(text):
    """For grpo.py --environment: the text of a turn -> the tool's reply, None where the turn does not call it."""
    expression = called(text)
    if expression is None:
        return None
    numbers = QUESTION.fullmatch(expression + "=")
    if not numbers:
        return "error"
    a, op, b = numbers.groups()
    return str(result(int(a), op, int(b)))


# ---------------------------------------------------------------------------- files


def draw(rng, digits, exact=False):
    """Draw (a, op, b), numbers of up to `digits` digits; in a-b the larger one comes first. exact: both numbers have
    exactly so many, and the result has no fewer: the tests do not ask whether zeros in front are left out."""
    while True:
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
        a, b = numbers
        if not exact or len(str(result(a, op, b))) >= digits:
            return a, op, b


def pair(a, op, b):
    """The two numbers of a sum, in a fixed order: sums with the same pair count as the same."""
    return min(a, b), max(a, b)


def chat(a, op, b, how):
    """A conversation: the answer is said at once ("plain"), or after a thought ("think"), or after a call ("call")."""
    asked = {"role": "user", "content": f"{a}{op}{b}=?"}
    number = str(result(a, op, b))
    if how == "call":
        asks = {"role": "assistant", "content": call(f"{a}{op}{b}")}
        return {"messages": [asked, asks, {"role": "tool", "content": number},
                             {"role": "assistant", "content": number}]}
    thought = ""
    if how == "think":
        lines = "\n".join(columns(a, op, b))
        thought = f"<think>\n{lines}\n</think>\n"
    return {"messages": [asked, {"role": "assistant", "content": thought + number}]}


def gap(rng):
    """A random number of line breaks, so that the model cannot find a thought by its distance alone."""
    return "\n" * rng.randint(1, 10)


def question(a, op, b):
    return {"prompt": f"{a}{op}{b}=?"}


def text_line(rng, sums, cfg):
    """One piece of the pretraining text: a single column, a sum with its result, or a sum worked out line by line."""
    if rng.random() < 0.1:
        x, y, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
        return f"{x}+{y}+{carry}={x + y + carry}"
    a, op, b = next(sums)
    if rng.random() < cfg.worked_text:
        # <think> comes only in conversations. There other tokens stand between question and thought; a random number of
        # line breaks here makes the model look for digits at any distance
        thought = "\n".join(columns(a, op, b))
        return f"{a}{op}{b}=?{gap(rng)}{thought}{gap(rng)}{result(a, op, b)}"
    return f"{a}{op}{b}={result(a, op, b)}"


def unseen(rng, held_out, digits, exact):
    """Yield sums without end, none of them held out."""
    while True:
        a, op, b = draw(rng, digits, exact)
        if pair(a, op, b) not in held_out:
            yield a, op, b


def write(cfg, name, records):
    with open(os.path.join(cfg.out_dir, name), "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record) + "\n")


def main(cfg):
    check(2 <= cfg.digits <= 8, f"digits={cfg.digits}: wanted 2 to 8")
    check(cfg.calls <= 1_000, f"calls={cfg.calls}: tools-sft.jsonl has 1,000 conversations")
    os.makedirs(cfg.out_dir, exist_ok=True)
    # the tests first, always the same ones (their seed is fixed); all other sums are drawn without them
    held_out = set()
    lengths = range(1, cfg.digits + 1)
    for name, of_digits in (
            ("dev", (cfg.digits, cfg.digits + 1)),
            ("test", (cfg.digits, cfg.digits + 1)),
            ("tools-test", lengths)):
        rng = random.Random(f"held out: {name}")
        records = []
        for digits in of_digits:
            sums = unseen(rng, held_out, digits, exact=True)
            for _ in range(cfg.tests):
                a, op, b = next(sums)
                if digits > 1:  # sums of one digit are too few to leave any out
                    held_out.add(pair(a, op, b))
                records.append({"digits": digits, **question(a, op, b), "answer": str(result(a, op, b))})
        write(cfg, f"{name}.jsonl", records)

    rng = random.Random(f"sums {cfg.seed}")
    mixed = unseen(rng, held_out, cfg.digits, exact=False)
    longest = unseen(rng, held_out, cfg.digits, exact=True)
    # iter(int, 1) calls int(), which is 0, until it is 1: without end
    any_length = (next(unseen(rng, held_out, rng.choice(lengths), exact=True)) for _ in iter(int, 1))
    # train the vocabulary on texts with digits, tags and calls
    examples = [chat(*next(longest), how)["messages"] for how in ("think", "call") for _ in range(1_000)]
    texts = ["\n".join(message["content"] for message in messages) for messages in examples]
    train_tokenizer(texts, os.path.join(cfg.out_dir, "tokenizer.model"), vocab_size=512)
    # half of the sums in the text have the longest numbers: there are many more of them to learn
    both = (next(rng.choice((mixed, longest))) for _ in iter(int, 1))
    documents = ("\n".join(text_line(rng, both, cfg) for _ in range(10)) for _ in range(cfg.documents))
    write(cfg, "text.jsonl", ({"text": text} for text in documents))
    hows = ["think"] * cfg.worked + ["plain"] * cfg.plain
    tool_hows = ["call"] * cfg.calls + ["plain"] * (1_000 - cfg.calls)
    for name, sums, answers in (("", longest, hows), ("tools-", any_length, tool_hows)):
        conversations = [chat(*next(sums), how) for how in answers]
        rng.shuffle(conversations)
        write(cfg, f"{name}sft.jsonl", conversations)
    write(cfg, "prompts.jsonl", (question(*next(longest)) for _ in range(cfg.prompts)))
    # all questions of one digit, in a file of their own, so that prepare.py --repeat=short:48 can repeat them
    short = [(a, op, b) for a in range(10) for b in range(10) for op in "+-" if op == "+" or a >= b]
    longer = [it for it in (next(any_length) for _ in range(cfg.prompts)) if max(it[0], it[2]) > 9]
    os.makedirs(os.path.join(cfg.out_dir, "tools-prompts"), exist_ok=True)
    write(cfg, "tools-prompts/short.jsonl", (question(*it) for it in short))
    write(cfg, "tools-prompts/longer.jsonl", (question(*it) for it in longer))
    print(f"{cfg.out_dir}: {cfg.documents:,} documents of ten sums, {cfg.worked} + {cfg.plain} conversations, "
          f"{cfg.prompts:,} prompts, {len(held_out):,} pairs held out")


if __name__ == "__main__":
    run(main, Config)
