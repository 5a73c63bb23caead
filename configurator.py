"""
Settings for every script: defaults of its Config dataclass < a Python config file < --key=value.

    if __name__ == "__main__":
        run(main, Config)                      # python pretrain.py config/baby.py --lr=3e-4
        run(main, Config, positional="name")   # python prepare.py poems --vocab_size=8000

A config file is plain Python (`batch_size = 8 * 64` works); each name it assigns must be a field of Config, unless it
begins with an underscore. `--help` prints every field with its type, default and the comment on its line.
"""
import ast
import dataclasses
import difflib
import inspect
import json
import os
import re
import runpy
import signal
import sys
import time
import traceback
import types
from typing import Annotated, Literal, get_args, get_origin

# Types for the fields of a Config. They say which numbers make sense, so that nothing is trained with --batch_size=0.
Count = Annotated[int, "a whole number, 1 or more", lambda x: 1 <= x < 2 ** 63]
Whole = Annotated[int, "a whole number, 0 or more", lambda x: 0 <= x < 2 ** 63]
Positive = Annotated[float, "a number above 0", lambda x: 0 < x < 1e38]
NonNegative = Annotated[float, "a number, 0 or more", lambda x: 0 <= x < 1e38]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]
Fraction = Annotated[float, "a number from 0 to below 1", lambda x: 0 <= x < 1]
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


# ---------------------------------------------------------------------------- errors a user can mend


def check(condition, message):
    """Exit with `error: message` where a user's setting, file or data is at fault."""
    if not condition:
        fail(message)


def fail(message):
    """Exit with an error. Under torchrun usually all processes come here for one reason; only rank 0 shall print it."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        # If rank 0 has failed too, torchrun ends this process within these seconds; else the error is this rank's own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        # at the end torchrun prints a report of its own, with the reason that it finds in this file
        error = f"error: {message}"
        reason = {"message": error, "extraInfo": {"py_callstack": error, "timestamp": int(time.time())}}
        with open(report, "w", encoding="utf-8") as f:
            json.dump({"message": reason}, f)
    sys.exit(f"error: {message}")


def run(main, Config, positional=None):
    """Read the settings and call main(cfg). What a user can cause ends in one line instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # a console that cannot show Chinese (ASCII, cp1252) prints \u5e8a instead of ending the run
        stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # half a character, as a backspace leaves it in some terminals
    try:
        main(load_config(Config, positional=positional))
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed in this Python ({sys.executable}). Run `source .venv/bin/activate`, or "
             "`pip install -r requirements.txt`")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        fail(error)
    except Exception as error:
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        if isinstance(error, MemoryError) or "out of memory" in reason or "allocate memory" in reason:
            fail(f"not enough memory: {reason}. A smaller --batch_size (with a larger --grad_accum the step stays the "
                 "same) or model, --checkpoint_blocks=True in pretrain.py")
        if "RANK" not in os.environ:
            raise
        if os.environ["RANK"] == "0":
            traceback.print_exc()
        fail(f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------------------- settings


def load_config(Config, argv=None, positional=None):
    """Return a Config built from `argv` (default: sys.argv[1:]). positional: the field that a word without -- sets."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(Config, positional))
        sys.exit(0)
    from_file = {}
    from_words = {}
    for word in argv:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if not equals:
                # --chat alone switches it on
                field = Config.__dataclass_fields__.get(key)
                check(field is None or field.type is bool, f"write {word} as {word}=VALUE")
                value = "True"
            from_words[key] = read_value(Config, key, value, "the command line")
        elif word.endswith(".py"):
            check(os.path.isfile(word), f"config file '{word}' does not exist (in {os.getcwd()})")
            for key, value in run_file(word).items():
                is_setting = not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
                if is_setting or key in Config.__dataclass_fields__:
                    from_file[key] = read_value(Config, key, value, word)
        else:
            free = positional and positional not in from_words
            check(free, f"cannot read '{word}': settings are --key=value, config files end in .py")
            from_words[positional] = read_value(Config, positional, word, "the command line")
    settings = {**from_file, **from_words}
    cfg = Config(**settings)
    check_needs(cfg, from_file, from_words)
    return cfg


def check_needs(cfg, from_file, from_words):
    """Exit where a setting that was given would change nothing. NEEDS, beside the script's Config, says when: {name:
    condition on other settings}, such as {"momentum": "optimizer == 'muon'"}."""
    needs = getattr(sys.modules[type(cfg).__module__], "NEEDS", {})
    for name, value in {**from_file, **from_words}.items():
        condition = needs.get(name, "True")
        # the command line may make a setting of the file useless (--optimizer=adamw the momentum): that is no error
        outdated = name not in from_words and set(re.findall(r"\w+", condition)) & set(from_words)
        holds = outdated or eval(condition, {}, vars(cfg))
        check(holds, f"{name}={value} changes nothing unless {condition}. Set that, or leave {name} out")


def run_file(path):
    """Run a Python file; return {name: value} of what it assigns."""
    try:
        return runpy.run_path(path)
    except Exception as error:
        fail(f"config file {path}: {type(error).__name__}: {error}")


def read_value(Config, key, value, where):
    """Return `value` in the type of the field `key`: a string is parsed, a value of Python is taken as it is."""
    fields = {f.name: f.type for f in dataclasses.fields(Config)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f", did you mean '{near[0]}'?" if near else ""
        fail(f"no setting '{key}'{hint} (from {where}; --help lists them all)")
    kind = fields[key]
    if get_origin(kind) is Literal:
        check(value in get_args(kind), f"{key}={value!r} (from {where}): known are {', '.join(get_args(kind))}")
        return value
    words = WORDS.get(kind)
    allowed = None
    if get_origin(kind) is Annotated:
        kind, words, allowed = get_args(kind)  # as in Count: int, the wanted number in words, a test of the value
    error = f"{key} wants {words}, got {value!r} (from {where})"
    if isinstance(value, str) and kind is not str:
        try:
            value = float(value) if kind is float else ast.literal_eval(value.strip().title())  # true is True
        except (ValueError, SyntaxError, TypeError):
            fail(error)
    # accept 0 and 1 for False and True, but not True for 1 (in Python a bool is an int); 1e5 for an int, but not 0.5
    accepted = {bool: (bool, int), int: (int, float), float: (int, float), str: str}[kind]
    check(isinstance(value, accepted) and isinstance(value, bool) <= (kind is bool), error)
    try:
        same = kind(value)
    except (OverflowError, ValueError):  # int(nan), float(10 ** 400)
        fail(error)
    check((same == value or kind is float) and (allowed is None or allowed(same)), error)
    return same


def changed(cfg):
    """Return {name: value} of the settings that differ from their defaults."""
    values = {f.name: (getattr(cfg, f.name), f.default) for f in dataclasses.fields(cfg)}
    return {name: value for name, (value, default) in values.items() if value != default}


def help_text(Config, positional=None):
    """Return the --help text: the script's docstring, then the lines of Config as they stand, with their comments."""
    doc = sys.modules[Config.__module__].__doc__ or ""
    lines = [doc.strip(), "", f"settings ({'NAME ' if positional else ''}[config.py] --key=value):"]
    for line in inspect.getsource(Config).splitlines():
        line = line.strip()
        if line.startswith("#"):
            lines.append(f"  {line}")
        elif ":" in line and "=" in line:
            lines.append(f"    --{line}")
    return "\n".join(lines)
