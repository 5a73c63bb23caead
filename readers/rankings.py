"""
Records to a question and its ranked answers, for the reward model and DPO.
"""
import re

from readers.account import Drop, Skip
from readers.chats import is_thumbs_down, to_prompt
from readers.fields import ANSWER, CHOSEN, COUNTERS, KNOWN, NAN, NUMBER, RANKING, REJECTED, THUMB
from readers.fields import as_list, as_text, brief, check_marks, filled, is_number, take, there
from readers.turns import read_turns, said, turns_of


def read_ranks(record, prompt, notes):
    """The answers to one question and their ranks, the lowest is the best: responses (or a list of answers) with ranks,
    scores or an order (their indices, best first); one chosen and one or more rejected; a list of answers, best
    first."""
    several = ["responses"]
    if filled(record, RANKING[1:]):
        several += [name for name in ("answers", *ANSWER) if isinstance(record.get(name), list)]
    answers = take(record, notes, *several)
    if answers is not None:
        answers = as_list(answers, "responses")
        ranks = as_list(take(record, notes, "ranks"), "ranks")
        scores = as_list(take(record, notes, "scores"), "scores")
        if not ranks and all(is_number(score) for score in scores):
            ranks = [-score for score in scores]  # the highest is the best
        if not ranks:
            order = as_list(take(record, notes, "order"), "order")
            ranks = [order.index(i) if i in order else None for i in range(len(answers))]
        if not answers or len(ranks) != len(answers) or not all(map(is_number, ranks)):
            raise Skip("no ranking", f"{len(answers)} responses; wanted as many numbers in ranks (lowest best), scores "
                       f"(highest best) or order (their places, best first): {there(record)}")
        return answers, ranks
    chosen = turns_of(take(record, notes, *CHOSEN))
    rejected = turns_of(take(record, notes, *REJECTED))
    if chosen is None and rejected is not None and prompt and prompt[-1]["role"] == "assistant":
        chosen = prompt.pop()["content"]  # the conversation ends with the good answer
    if chosen is not None and rejected is not None:
        lists = [name for name in ("responses", "answers", *ANSWER) if isinstance(record.get(name), list)]
        if is_number(chosen) and is_number(rejected) and lists:
            raise Skip("no ranking", f"are chosen {chosen} and rejected {rejected} places in {lists[0]}? Write the "
                       "texts themselves there")
        several = isinstance(rejected, list) and all(isinstance(answer, str) for answer in rejected)
        rejected = rejected if several else [rejected]
        if isinstance(chosen, list) and len(chosen) == 1:
            chosen = chosen[0]
        return [chosen, *rejected], [0] + [1] * len(rejected)
    answers = take(record, notes, "answers", *ANSWER)
    if isinstance(answers, list) and len(answers) > 1:
        check_best_first(answers, record)
        return answers, list(range(len(answers)))
    hint = "; thumbs up or down of one answer: --kind=sft learns the good ones" if filled(record, THUMB) else ""
    raise Skip("no ranked answers", f"{there(record)}; wanted chosen and rejected, responses and ranks, or a list of "
               f"answers{hint}. --fields=chosen:…,rejected:… says which is which")


def is_rank(value):
    """Whether a value may rank an answer: a number, also as a text, or whether it is the best."""
    if isinstance(value, str):
        return bool(NUMBER.fullmatch(value))
    return isinstance(value, bool) or is_number(value)


def check_best_first(answers, record):
    """Raise Skip where numbers stand beside a list of answers, or in each of them: then its order may mean nothing."""
    for answer in answers:
        for name, value in answer.items() if isinstance(answer, dict) else ():
            if is_rank(value) and (name == "rank" or not COUNTERS.search(name)):
                raise Skip("no ranking", f"does the {name} in each answer rank them? Write them as responses: [texts] "
                           "with ranks: [numbers] (lowest best) or scores: [numbers] (highest best)")
    for name, values in record.items():
        is_other = isinstance(values, list) and values is not answers
        if is_other and len(values) == len(answers) and all(is_rank(value) for value in values):
            raise Skip("no ranking", f"does {name} rank the answers? --fields=prompt:…,responses:…,ranks:{name} (lowest"
                       f" best) or scores:{name} (highest best); --fields=prompt:…,answer:… takes them as best first")


def check_order(record, notes):
    """Raise Skip where a field may say that two answers are the other way round: a lower score of the chosen one, or an
    unknown mark."""
    about = {name for name in record if re.search("chosen|rejected|score|margin|gap", name)}
    for name in {*record} - notes.used:
        score = record[name]
        other = record.get(name.replace("chosen", "rejected"))
        if isinstance(score, list) and len(score) == 2 and all(map(is_number, score)):
            score, other = score
        is_below = is_number(score) and is_number(other) and score < other
        if (is_below or str(score).lower() in ("tie", "tied")) and not COUNTERS.search(name):
            named = ",".join(f"{field}:{field}" for field in filled(record, record) if field in KNOWN)
            raise Skip("no ranking", f"{name} is {record[name]}, and that of a chosen answer should be above that of "
                       f"the rejected one: take those out, or --fields={named} believes their names")
    check_marks(record, notes.used | about | KNOWN - {*THUMB}, "label")


def to_ranking(record, notes):
    """A question and its answers: {"prompt": messages, "answers": [best, …, worst]}."""
    if not isinstance(record, dict):
        raise Skip("no ranked answers", there(record))
    prompt = to_prompt(record, notes)
    system = [m for m in prompt if m["role"] == "system"]
    answers, ranks = read_ranks(record, prompt, notes)
    # answers that are the whole text from its beginning, after a prompt that asks for them: "…### Response:"
    begin = record.get("prompt")
    is_begin = isinstance(begin, str) and all(isinstance(answer, str) and answer.startswith(begin) and (
        begin.rstrip().endswith((":", "：")) or answer[len(begin):len(begin) + 1].isspace()) for answer in answers)
    whole = []  # every answer at the end of its conversation, the best first
    by_rank = sorted(range(len(answers)), key=lambda i: ranks[i])
    for i in by_rank:
        if isinstance(answers[i], (list, dict)):
            turns = read_turns(answers[i], "answers", notes, "assistant")
        else:
            text = as_text(answers[i], "answers")
            turns = said(text.removeprefix(begin) if is_begin else text, "assistant", notes, is_whole=not prompt)
        if turns and turns[0]["role"] == "assistant":
            turns = prompt + turns
        else:
            # the answer comes with the whole conversation
            if turns and turns[0]["role"] != "system":
                turns = system + turns
            texts = "\n".join(m["content"] for m in turns)
            if not all(m["content"] in texts for m in prompt if m["role"] == "user"):
                raise Skip("answers to different prompts", "the prompt is not in what the answer begins with: "
                           f"{brief(texts)}")
        whole.append(turns)
    if not all(turns and all(m["content"] for m in turns) and turns[-1]["content"] not in NAN for turns in whole):
        raise Skip("empty", "a question or an answer has no words")
    prompts = [turns[:-1] for turns in whole]
    if any(turns[:-1] != prompts[0] or turns[-1]["role"] != "assistant" for turns in whole):
        raise Skip("answers to different prompts")
    if not prompts[0]:
        raise Skip("empty", "no question")
    if not notes.named:
        check_order(record, notes)
    elif is_thumbs_down(record, notes):
        raise Drop("thumbs down")
    # "Best first" cannot say "equally good": of answers with one rank, or with the same words, the first stays.
    kept = []
    seen = set()
    for i, turns in zip(by_rank, whole):
        words = turns[-1]["content"]
        if ranks[i] not in seen and words not in seen:
            kept.append(words)
        seen |= {ranks[i], words}
    if len(kept) < 2:
        raise Drop("fewer than two ranked answers")
    if len(kept) < len(whole):
        notes.cut["tied or equal answers"] += len(whole) - len(kept)
    return {"prompt": prompts[0], "answers": kept}
