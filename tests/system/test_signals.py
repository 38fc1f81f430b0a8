"""A limit of time for what strangers write."""

import gc
import re
import signal
import time
from contextlib import suppress

import pytest

from tuner.system.signals import OutOfTimeError, time_limit


def test_a_regular_expression_that_would_take_for_ever_is_interrupted():
    before, started = signal.getsignal(signal.SIGVTALRM), time.process_time()
    with pytest.raises(OutOfTimeError), time_limit(0.1):
        re.search("^(a|aa)+$", "a" * 60 + "b")
    assert time.process_time() - started < 1
    assert signal.getsignal(signal.SIGVTALRM) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_interrupted_again_where_the_first_time_is_lost():
    def use_time(seconds):
        while time.process_time() < started + seconds:
            pass

    class Slow:
        def __del__(self):  # Python prints what is raised in here, and goes on
            use_time(0.2)

    def work():
        Slow()
        use_time(2)

    started = time.process_time()
    with pytest.raises(OutOfTimeError), time_limit(0.1):
        work()
    assert time.process_time() - started < 1


def test_no_garbage_is_collected_within_the_time():
    for fails in (False, True):
        with suppress(ValueError), time_limit(0.1):
            assert not gc.isenabled()
            if fails:
                raise ValueError
        assert gc.isenabled()


def test_what_is_done_in_time_is_left_alone_and_so_is_what_comes_after():
    with time_limit(0.1):
        pass
    started = time.process_time()
    while time.process_time() < started + 0.2:
        pass
