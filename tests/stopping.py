"""The command in a process that stops itself at a moment of the run, on any machine and load.

A run is interrupted or killed there: the test sends its signal, while nothing goes on.
"""

import json
import os
import signal
import subprocess
import sys

if __name__ == "__main__":
    from kdkernels import __main__ as command
    from kdkernels.train.run_folder import RunFolder


def start(*arguments, at, times=1, calls=0, **options):
    """A process of the command, stopped.

    It stops once it has written a line of metrics with the text ``at`` so many times, and has then
    called so many functions. ``options`` are subprocess.Popen's.
    """
    call = [sys.executable, __file__, at, str(times), str(calls), *map(str, arguments)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(call, text=True, **streams | options)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        said = process.stderr.read()
        process.stderr.close()
        raise AssertionError(f"it ended with {os.waitstatus_to_exitcode(status)}: {said}")
    return process


def end(process, number):
    """Send a stopped process a signal, let it go on; its exit status and its last words."""
    with process:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        said = process.stderr.read()
    return process.returncode, said


def stop_at(text, times, calls):
    """Let this process stop itself."""
    log, left = RunFolder.log, {"times": times, "calls": calls}

    def called(*_):
        left["calls"] -= 1
        if left["calls"] < 0:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGSTOP)

    def logged(folder, sync=False, **record):
        log(folder, sync, **record)
        left["times"] -= text in json.dumps(record)
        if left["times"] == 0:
            left["times"] = -1
            sys.setprofile(called)

    RunFolder.log = logged


if __name__ == "__main__":
    at, times, calls, *arguments = sys.argv[1:]
    stop_at(at, int(times), int(calls))
    sys.exit(command.main(arguments))
