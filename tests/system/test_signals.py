"""A limit of time for what strangers write."""

import re
import signal
import time

import pytest

from tuner.system.signals import OutOfTimeError, time_limit


def test_a_regular_expression_that_would_take_for_ever_is_interrupted():
    before, started = signal.getsignal(signal.SIGVTALRM), time.process_time()
    with pytest.raises(OutOfTimeError), time_limit(0.1):
        re.search("^(a|aa)+$", "a" * 60 + "b")
    assert time.process_time() - started < 1
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_what_is_done_in_time_is_left_alone_and_so_is_what_comes_after():
    with time_limit(0.1):
        pass
    started = time.process_time()
    while time.process_time() < started + 0.2:
        pass
