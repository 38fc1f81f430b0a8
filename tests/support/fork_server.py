"""Start scripts as processes of their own, and import torch and the rest, which takes 5 s and more, once.

A server process, one for each worker of pytest, imports all that the scripts do and forks a child for each.
The child has its own signals, streams and exit code, and runs the script's file as `python script.py` would.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_servers = []  # of this process


class Child:
    """What subprocess.Popen gives, of a script that a fork server started."""

    def __init__(self, status, streams):
        """status: file from which its pid comes, and its exit code when it ends; streams: {name: file}."""
        self.status, self.returncode = status, None
        self.stdout, self.stderr = streams.get("stdout"), streams.get("stderr")
        self.pid = int(self._read_line())

    def _read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            more = os.read(self.status, 1)
            assert more, "the fork server ended"
            line += more
        return line

    def poll(self):
        if self.returncode is None:
            os.set_blocking(self.status, False)
            with suppress(BlockingIOError):
                line = self._read_line()
                self.returncode = int(line)
        return self.returncode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start_script(script, *arguments, folder=".", streams=None, session=False, before="", env=None):
    """Start a script of the root as a process; return its Child, with stdout and stderr as text files.

    streams: {"stdin", "stdout", "stderr": file descriptor} in place of pipes; session: make stdin its
    controlling terminal; before: Python that it runs first; env: what to add to its environment.
    """
    if not _servers:
        _servers.append(_start_server())
    given, pipes, files = dict(streams or {}), [], {}
    for name in ("stdout", "stderr"):
        if name not in given:
            reader, given[name] = os.pipe()
            pipes.append(given[name])
            files[name] = open(reader, encoding="utf-8", newline="")  # noqa: SIM115  the test reads on
    given.setdefault("stdin", os.open(os.devnull, os.O_RDONLY))
    status, status_end = os.pipe()
    request = {
        **{"script": str(script), "arguments": [str(a) for a in arguments], "folder": str(folder)},
        **{"session": session, "before": before, "env": {**os.environ, **(env or {})}},
    }
    data = json.dumps(request).encode()
    descriptors = [given["stdin"], given["stdout"], given["stderr"], status_end]
    socket.send_fds(_servers[0], [len(data).to_bytes(4, "big")], descriptors)
    _servers[0].sendall(data)
    for descriptor in (*pipes, status_end):
        os.close(descriptor)
    return Child(status, files)


def run_command(command, stdout, stderr, env):
    """Do what subprocess.run does of [python, script, argument, …], by a fork; stderr goes to stdout.

    To stand in for subprocess.run in code that is tested.
    """
    assert command[0] == sys.executable
    assert stderr == subprocess.STDOUT
    streams = {"stdout": stdout.fileno(), "stderr": stdout.fileno()}
    child = start_script(Path(command[1]).resolve(), *command[2:], streams=streams, env=env)
    return subprocess.CompletedProcess(command, child.wait(timeout=300))


def _start_server():
    ours, theirs = socket.socketpair()
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


# ------------------------------------------------------------------------------ in the server's process


def serve(connection):
    """Fork a child for each request until the connection is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the waiters
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, 4, 4)
        if not head:
            return
        size, data = int.from_bytes(head, "big"), b""
        while len(data) < size:
            data += connection.recv(size - len(data))
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            wait_for_child(json.loads(data), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def wait_for_child(request, stdin, stdout, stderr, status):
    """Fork the child, write its pid and then its exit code, as subprocess has it, to `status`; exit."""
    os.setsid()  # a signal for the child's group is not one for this process
    pid = os.fork()
    if pid == 0:
        os.close(status)
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, number)
        run(request)
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\n".encode())
    os._exit(0)


def run(request):
    """Run a request's script as Python would, and exit with its code."""
    code = 1
    try:
        if request["session"]:
            import fcntl  # not on Windows
            import termios

            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        else:
            os.setpgid(0, 0)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  as long as the process
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        sys.argv = [request["script"], *request["arguments"]]
        exec(request["before"], {})
        runpy.run_path(str(ROOT / request["script"]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def import_all():
    """Import what the scripts import, once."""
    sys.path.insert(0, str(ROOT))
    from tuner.system import libraries

    with libraries.heavy_imports():
        import train_qlora  # noqa: F401
        from tuner.data import tokenized  # noqa: F401
        from tuner.model import fused, gemma_tokenizer, loading, lora  # noqa: F401
        from tuner.serving import http_server  # noqa: F401
        from tuner.training import checkpoint_state, gpu_budget, trainer  # noqa: F401


if __name__ == "__main__":
    import_all()
    serve(socket.socket(fileno=int(sys.argv[1])))
