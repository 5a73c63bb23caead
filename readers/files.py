"""
Which files are read, which split each belongs to by its name (train-00.jsonl, test/a.txt), and how often.
"""
import glob
import os
import re
import sys

from configurator import check
from readers.records import READERS, UNPACKERS, extension, stem

# What the names of files, folders and splits say of what is held out.
TRAIN_WORDS = ("train", "training", "trainset", "训练", "训练集", "训练数据")
VAL_WORDS = ("val", "valid", "validation", "valset", "dev", "devel", "development", "devset", "test", "testing",
             "testset", "eval", "evaluation", "heldout", "holdout", "held", "验证", "验证集", "验证数据", "测试", "测试集",
             "测试数据", "开发集")


# what the datasets library writes beside the data, and says nothing
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_files(given, repeat=""):
    """[(path, split, how often to train on it)] of all readable files, sorted. given: a file, a folder, a pattern such
    as "corpus/*.jsonl", or several of these with commas between them."""
    roots = roots_of(given)
    found = {}  # path → the root it was found under
    for root in roots:
        for path in files_below(root):
            found.setdefault(path, root)
    readable = READERS if any(extension(path) in READERS for path in found) else (".bin",)  # token ids stand alone
    paths = sorted(path for path in found if extension(path) in readable and os.path.basename(path) not in ABOUT)
    others = {*found} - {*paths}
    endings = " ".join(sorted({os.path.splitext(path)[1] or "none" for path in others}))
    check(paths, f"--input={given} has no file to read: wanted {' '.join(READERS)}, plain or with "
          f"{' '.join(UNPACKERS)}; found {len(found)} files with endings: {endings or '-'}")
    if others:
        print(f"note: {len(others)} of the {len(found)} files under {given} are not read, with endings: {endings}",
              file=sys.stderr)
    times = dict(read_names("repeat", repeat, {stem(path) for path in paths}))
    splits = [split_of_path(path, found[path]) for path in paths]
    if not {"train", "val"} <= set(splits):
        splits = [None] * len(paths)  # they are not divided into train-00.jsonl and test-00.jsonl, or train/ and test/
    return [(path, split, times.get(stem(path), 1)) for path, split in zip(paths, splits)]


def roots_of(given):
    """The files and folders that --input names."""
    roots = []
    for part in [given] if os.path.exists(given) else given.split(","):
        matches = [part] if os.path.exists(part) else sorted(glob.glob(part.strip(), recursive=True))
        check(matches, f"--input={part} does not exist (looked in {os.getcwd()}): give files, folders or patterns")
        roots += matches
    return roots


def files_below(root):
    """Yield the files of a folder and of the folders in it, also where they are links; or `root`, where it is a file.
    Names that begin with a dot are those of caches and the like."""
    if not os.path.isdir(root):
        yield root
        return
    seen = set()

    def fail_to_read(error):
        raise error

    for folder, inside, names in os.walk(root, followlinks=True, onerror=fail_to_read):
        seen.add(os.path.realpath(folder))
        inside[:] = [name for name in inside if not name.startswith(".") and name != "__MACOSX"]
        for name in list(inside):
            path = os.path.join(folder, name)
            if os.path.realpath(path) in seen:
                inside.remove(name)  # a link that leads back to where it stands
            elif os.path.islink(path):
                print(f"note: {path} is a link to a folder, which is read, too", file=sys.stderr)
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def split_of_path(path, root):
    """The split that a folder below `root` is named after, test/; or else a file's name says, my.train.jsonl."""
    inside = os.path.basename(path) if path == root else os.path.relpath(path, root)
    *folders, file = inside.lower().split(os.sep)
    for ending in (*UNPACKERS, *READERS):
        file = file.removesuffix(ending)
    named = [folder for folder in folders if folder in TRAIN_WORDS + VAL_WORDS]
    for name in [*reversed(named), file, *reversed(folders)]:
        split = split_of(name)
        if split:
            return split
    return None


def split_of(name):
    """The split that is meant by "validation", "train-00001", "cmrc2018_dev" and the like: "train", "val" or None."""
    words = re.findall(r"[a-z]{2,}|[\u4e00-\u9fff]+", str(name).lower())  # of "dev_v2" not the v
    for word in words[:1] + words[-1:]:
        if word in TRAIN_WORDS:
            return "train"
        if word in VAL_WORDS:
            return "val"
    return None


def read_names(setting, value, known):
    """[("a", "b"), …] of a setting like "a:b,c:d"; the first names must be known ones."""
    pairs = []
    for item in filter(None, value.split(",")):
        name, _, meaning = item.strip().partition(":")
        check(name in known and meaning, f"--{setting}={value}: wanted NAME:VALUE,NAME:VALUE, where NAME is one of "
              f"{', '.join(sorted(known))}")
        if setting == "repeat":
            check(meaning.isdecimal() and 0 < int(meaning) < 256, f"--repeat={value}: wanted {name}:1 to {name}:255")
            meaning = int(meaning)
        pairs.append((name, meaning))
    return pairs
