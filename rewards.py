"""Rewards written as rules, for ppo.py --reward=rewards.py:quatrain or --watch=rewards.py:quatrain."""
from poems import FORMS, poem_lines


def quatrain(prompt, answer):
    """1 if the answer has the lines and characters of the form that the prompt names; lines too many, too few or of
    another length lower it (never below -1). 0 if the prompt names no form."""
    form = next((form for form in FORMS if form in prompt), None)
    if form is None:
        return 0.0
    n_lines, length = FORMS[form]
    lines = poem_lines(answer)
    right = sum(len(line) == length for line in lines[:n_lines])
    return max(-1.0, (right - abs(len(lines) - n_lines)) / n_lines)
