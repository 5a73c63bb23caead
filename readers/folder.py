"""
A folder that is there as a whole or not at all, whatever moment its making is stopped at, and made by one process.
"""
import contextlib
import os
import shutil

from configurator import check


@contextlib.contextmanager
def new_folder(folder):
    """Give a folder to write into, folder.tmp. If all goes well it takes the place of `folder`; else that stays."""
    with only_process(folder):
        clear_leftovers(folder)
        try:
            os.makedirs(folder + ".tmp")
            yield folder + ".tmp"
            if os.path.exists(folder):
                os.rename(folder, folder + ".old")
            os.rename(folder + ".tmp", folder)
        finally:
            clear_leftovers(folder)


@contextlib.contextmanager
def only_process(folder):
    """Exit where another process is making the same folder. The lock ends with the process, however that ends."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    path = folder + ".lock"
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                check(False, f"another process is preparing {folder}. Wait for it, or choose another name")
            # the one before may have removed the file while this one was waiting to open it
            if os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                try:
                    yield
                finally:
                    os.remove(path)
                return


def clear_leftovers(folder):
    """Whatever moment a run was killed at, afterwards there is the old folder, or the new one, or none."""
    if os.path.exists(folder + ".old") and not os.path.exists(folder):
        os.rename(folder + ".old", folder)
    for leftover in (folder + ".old", folder + ".tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    check(not os.path.exists(folder) or os.path.exists(os.path.join(folder, "meta.json")),
          f"{folder} exists and was not made by prepare.py, so it is not replaced: choose another name")
