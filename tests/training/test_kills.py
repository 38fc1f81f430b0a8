"""Kill -9, signals, a connection that goes away: in processes of their own."""

import os
import pty
import signal
import time

import pytest

from tests.support import fork_server
from tests.support.training import killer
from tuner.training import checkpoints

KILLS_EACH = 10  # 50 in all


@pytest.fixture(scope="module")
def kill(arguments, tmp_path_factory):
    # Of 6 steps: the third checkpoint is the first that has another one removed.
    with killer(tmp_path_factory.mktemp("kills"), [*arguments, "--epochs", 3]) as kill:
        yield kill


@pytest.mark.parametrize("seed", ["one", "two", "three", "four", "five"])
def test_killed_at_fifty_moments_each_goes_on_to_the_same_adapter(kill, seed):
    undisturbed, kills = kill(seed, KILLS_EACH)
    assert len(kills) == KILLS_EACH
    assert {killed["sha256"] for killed in kills} == {undisturbed["sha256"]}
    assert [killed["extra"] for killed in kills if killed["extra"]] == []
    assert sum(killed["whole"] > 0 for killed in kills) > 0.4 * KILLS_EACH
    left = {name for killed in kills for name in killed["left"]}
    assert any(name.startswith(".checkpoint.") for name in left), "none in a checkpoint"
    assert any(name.startswith(".adapter.") for name in left), "none in the final write"


def start(arguments, folder, **options):
    """Start train_qlora.py as a process of its own; return it."""
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return fork_server.start_script("train_qlora.py", *arguments, folder=folder, env=environment, **options)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def newest_whole(output, capsys):
    """Return the newest checkpoint of a folder in which none is damaged."""
    checkpoint = checkpoints.newest(output)
    assert capsys.readouterr().out == ""
    return checkpoint


def test_a_dropped_connection_costs_nothing(arguments, tmp_path, capsys):
    """The terminal of a session goes away, as with ssh: a hang-up, and nobody to read what is printed."""
    main, terminal = pty.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = start([*arguments, "--epochs", 10_000], tmp_path, streams=streams, session=True)
    os.close(terminal)
    printed = b""
    while b"epoch  2/" not in printed and b"epoch     2/" not in printed:
        printed += os.read(main, 1000)
    os.close(main)  # the kernel sends SIGHUP
    assert process.wait(timeout=30) == 129
    newest = newest_whole(tmp_path / "qlora_output", capsys)
    assert newest.step >= 4
    assert newest.step == len(newest.history["losses"])


def test_ctrl_c_of_a_pipe_whose_reader_it_ends_too(arguments, tmp_path, capsys):
    """As in `python train_qlora.py | tee log`: tee dies of the same Ctrl-C, and nothing can be printed."""
    reader, writer = os.pipe()
    process = start([*arguments, "--epochs", 10_000], tmp_path, streams={"stdout": writer, "stderr": writer})
    os.close(writer)
    printed = b""
    while b"epoch" not in printed:
        printed += os.read(reader, 1000)
    os.close(reader)
    output = tmp_path / "qlora_output"
    step = checkpoints.checkpoint_dirs(output)
    wait_for(lambda: checkpoints.checkpoint_dirs(output)[:1] > step)  # it goes on unread
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert newest_whole(output, capsys)


def test_a_second_ctrl_c_quits_immediately(arguments, tmp_path):
    slow = (
        "import time\n"
        "from tuner.training import accumulation\n"
        "def slow(*args):\n    print('in a step', flush=True)\n    while True: time.sleep(0.01)\n"
        "accumulation.all_reduce_step = slow\n"
    )
    process = start(arguments, tmp_path, before=slow)
    while "in a step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)  # longer than a launcher takes to pass the first one on
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    errors = process.stderr.read()
    assert "finishing this step and saving a checkpoint; press Ctrl-C again to quit now" in errors
    assert "Traceback" not in errors
