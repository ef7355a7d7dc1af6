"""The local launcher: real processes that end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aftershock.lab.launch import Job, LocalLauncher, job_for

READS_TO_THE_END = "import sys; sys.stdin.read()"


def _job(tmp_path: Path, code: str) -> Job:
    return Job("job", (sys.executable, "-c", code), (tmp_path,), tmp_path / "logs" / "job.log")


def _wait(launcher: LocalLauncher, handle: str) -> str:
    give_up = time.monotonic() + 30
    while (state := launcher.poll(handle)) == "running":
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return state


def test_submit_poll_and_log(tmp_path: Path) -> None:
    launcher = LocalLauncher(num_processes=1)
    assert _wait(launcher, launcher.submit(_job(tmp_path, "print('hello')"))) == "done"
    assert _wait(launcher, launcher.submit(_job(tmp_path, "raise SystemExit(3)"))) == "failed"
    assert "hello" in (tmp_path / "logs" / "job.log").read_text()


def test_cancel_ends_the_process(tmp_path: Path) -> None:
    launcher = LocalLauncher(num_processes=1)
    handle = launcher.submit(_job(tmp_path, READS_TO_THE_END))
    assert launcher.poll(handle) == "running"
    launcher.cancel(handle)
    assert launcher.poll(handle) == "failed"


def test_a_job_dies_with_a_parent_killed_by_9(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from aftershock.lab.launch import Job, LocalLauncher\n"
        f"code = 'import os, time; from aftershock.lab.job import watch_lifeline; watch_lifeline(); '\\\n"
        "       'print(os.getpid(), flush=True); time.sleep(120)'\n"
        f"job = Job('j', (sys.executable, '-c', code), (), Path({str(tmp_path / 'child.log')!r}))\n"
        "LocalLauncher(num_processes=1).submit(job); time.sleep(120)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "child.log"
    give_up = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    child = int(log.read_text().split()[0])
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < give_up, "the job outlived its parent"
        time.sleep(0.05)


def test_a_job_is_one_command_on_its_folders(tmp_path: Path) -> None:
    job = job_for([tmp_path / "a", tmp_path / "b"], fleet_size=2, log=tmp_path / "log")
    assert job.command[1:4] == ("-m", "aftershock", "run")
    assert str(tmp_path / "a") in job.command
    assert job.command[-2:] == ("--fleet-size", "2")


def test_a_negative_number_of_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LocalLauncher(num_processes=-1)
