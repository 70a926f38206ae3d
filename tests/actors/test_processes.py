"""Which processes belong together, with the first one dead."""

from __future__ import annotations

import signal
import subprocess
import sys

from timetier.actors.processes import family, send, started, wait_for

MARK = "TIMETIER_TEST_FAMILY=7c1e"
PARENT = """
import subprocess, sys
waits = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
for own_session in (False, True):
    child = subprocess.Popen(waits, stdout=subprocess.PIPE, start_new_session=own_session)
    child.stdout.readline()
    print(child.pid, flush=True)
input()
"""


def test_the_family_of_a_killed_process_is_found_and_ended() -> None:
    name, _, value = MARK.partition("=")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value},
    ) as leader:
        since = started(leader.pid)
        assert leader.stdout is not None
        children = {int(leader.stdout.readline()) for _ in range(2)}
        assert set(family(leader.pid, since, MARK)) == {leader.pid, *children}
        leader.send_signal(signal.SIGKILL)
        leader.wait(30)
        left = family(leader.pid, since, MARK)
        assert set(left) == children
        send(left, signal.SIGKILL)
        assert wait_for(left, 30)
        assert family(leader.pid, since, MARK) == {}


def test_a_later_process_with_the_same_pid_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        earlier = {process.pid: started(process.pid) + "0"}
        send(earlier, signal.SIGKILL)
        assert wait_for(earlier, 0)
        assert process.poll() is None
        assert family(process.pid, "another-boot:1", MARK) == {}
