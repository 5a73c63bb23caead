"""
Settings for every script: defaults of its Config dataclass < a Python config file < --key=value.

    from configurator import load_config
    cfg = load_config(Config)                  # python pretrain.py config/baby.py --lr=3e-4
    cfg = load_config(Config, positional="name")   # python prepare.py poems --vocab_size=8000

A config file is plain Python (`batch_size = 8 * 64` works); each name it assigns must be a field of Config, unless it
begins with an underscore. `--help` prints every field with its type, default and the comment on its line.
"""
import ast
import dataclasses
import difflib
import inspect
import os
import runpy
import sys
import types


def load_config(Config, argv=None, positional=None):
    """Return a Config built from `argv` (default: sys.argv[1:]).

    positional: name of the field that bare words fill (one word); without it a bare word is an error.
    A user's mistake leaves the program with a message that names the key, the value found and the fix.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(Config, positional))
        sys.exit(0)
    try:
        return parse(Config, argv, positional)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse(Config, argv, positional=None):
    """Like load_config, but raises ValueError instead of leaving the program."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values, source = {}, {}

    def put(key, value, where):
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise ValueError(f"no setting '{key}'" + (f", did you mean '{near[0]}'?" if near else "")
                             + f" (from {where}; --help lists them all)")
        values[key], source[key] = convert(key, value, fields[key].type, where), where

    for arg in argv:
        if arg.startswith("--"):
            if "=" not in arg:
                raise ValueError(f"write {arg} as {arg}=VALUE")
            key, _, value = arg[2:].partition("=")
            put(key.replace("-", "_"), value, "command line")
        elif arg.endswith(".py"):
            if not os.path.isfile(arg):
                raise ValueError(f"config file '{arg}' does not exist (in {os.getcwd()})")
            for key, value in runpy.run_path(arg).items():
                if key.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
                    continue
                if source.get(key) != "command line":  # the command line wins wherever it stands
                    put(key, value, arg)
        elif positional and source.get(positional) != "command line":
            put(positional, arg, "command line")
        else:
            raise ValueError(f"cannot read '{arg}': settings are --key=value, config files end in .py")
    return Config(**values)


def convert(key, value, kind, where):
    """Return `value` as type `kind` (bool, int, float or str); a string is parsed, a Python value is checked."""
    kind = {"bool": bool, "int": int, "float": float, "str": str}.get(kind, kind)
    error = ValueError(f"{key} wants {kind.__name__}, got {value!r} (from {where})")
    if kind is str:
        if not isinstance(value, str):
            raise error
        return value
    if isinstance(value, str):
        word = value.strip()
        if kind is bool:
            if word.lower() not in ("true", "false", "1", "0"):
                raise error
            return word.lower() in ("true", "1")
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            try:
                value = float(word)  # inf, nan
            except ValueError:
                raise error from None
    if kind is bool:
        if not isinstance(value, bool):
            raise error
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error
    if kind is int and value != value // 1:
        raise error  # 1e5 is a fine int, 0.5 is not
    return kind(value)


def changed(cfg):
    """Return {name: value} of the settings that differ from their defaults."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}


def help_text(Config, positional=None):
    """Return the --help text: the script's docstring, then each field with type, default and comment."""
    doc = sys.modules[Config.__module__].__doc__ or ""
    lines = [doc.strip(), "", f"settings ({'NAME ' if positional else ''}[config.py] --key=value):"]
    comments, group = {}, ""
    for line in inspect.getsource(Config).splitlines()[1:]:
        code, _, comment = line.partition("  #")
        name = code.split(":")[0].strip()
        if line.strip().startswith("# "):
            group = line.strip()[2:]
        elif name.isidentifier():
            comments[name] = (group, comment.strip())
            group = ""
    for f in dataclasses.fields(Config):
        group, comment = comments.get(f.name, ("", ""))
        if group:
            lines.append(f"  {group}")
        kind = f.type if isinstance(f.type, str) else f.type.__name__
        lines.append(f"    --{f.name}={f.default!r:<14} {kind:<6} {comment}")
    return "\n".join(lines)
