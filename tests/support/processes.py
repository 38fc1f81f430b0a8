"""What a test's process meets on a machine: a full disk, another process that writes the same folder."""

import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def disk_for(size):
    """Let no file grow over `size` bytes in the body: for every writer, the same error as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def other_writer(output):
    """Start a process that holds the lock of `output`, kill it after the body; give its number."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from tuner.system import atomic\n"
        f"with atomic.exclusive_lock({str(output)!r}):\n    print('there', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"there\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
