"""Put the faults listed beside this file into copies of the tree and see that tests fail.

    PYTHONPATH=tests python -m mutants.run [NAME ...]    all, or those alone; * is any text

Two copies in build/mutants are worked on side by side: one for faults of the extension and of
Python, one for those of CUDA kernels, with which the first helps when its own are done. They keep
what they built, so that a fault costs the compiling of what includes it, and one in a header that
CUDA sources share that of one source. The table is printed, and stands in
build/mutants/result.json; what each fault's build and tests said is in build/mutants/logs.
"""

import contextlib
import dataclasses
import fcntl
import filecmp
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from mutants import cpp, cuda, python, sweeps

FAULTS = cuda.FAULTS + sweeps.FAULTS + cpp.FAULTS + python.FAULTS
ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
LIMIT = 900  # seconds of a fault's tests; more is a deadlock
CORES = len(os.sched_getaffinity(0))


@dataclasses.dataclass
class Result:
    """What became of a fault."""

    name: str
    file: str
    status: str  # killed, survived, no fault, error
    by: str = ""  # the test that failed, or what is wrong
    build: float = 0.0  # seconds
    tests: float = 0.0
    user: float = 0.0  # seconds of processor time, both together


class Stopped(Exception):
    """Ctrl-C, or the end of another worker."""


class Processes:
    """What runs now, to be ended with this process."""

    def __init__(self):
        self.sessions, self.stopped, self.lock = set(), False, threading.Lock()

    def run(self, command, log, limit=None, **options):
        """(exit status, None beyond the limit; seconds; seconds of processor time)."""
        began = time.monotonic()
        with log.open("ab") as out, self.lock:
            if self.stopped:
                raise Stopped
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
            self.sessions.add(process.pid)
        late = threading.Event()
        timer = threading.Timer(limit or 10**6, lambda: (late.set(), end(process.pid)))
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        timer.cancel()
        with self.lock:
            self.sessions.discard(process.pid)
            end(process.pid)  # what it started and left behind
            if self.stopped:
                raise Stopped
        code = None if late.is_set() else process.returncode
        return code, time.monotonic() - began, usage.ru_utime + usage.ru_stime

    def stop(self):
        with self.lock:
            self.stopped = True
            for session in self.sessions:
                end(session)


def end(session):
    """Kill what a process started in a session of its own, whatever groups it made there."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getsid(int(name)) == session:
                os.kill(int(name), signal.SIGKILL)


class Copy:
    """A copy of the tree."""

    def __init__(self, name, processes, jobs):
        self.folder, self.processes = WORK / name, processes
        self.changed = WORK / f"{name}.changed"  # there as long as a fault is in the copy
        self.built = WORK / f"{name}.built"  # digest of what the extension here was built from
        path = os.pathsep.join(map(str, [self.folder, self.folder / "tests"]))
        # Python's own cache tells files apart by second and size.
        self.launchers = None  # the object of each source, once they are built
        self.environment = os.environ | {
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "KDKERNELS_EMULATED_ARCH": "90",
            "KDKERNELS_CUDA": "0",
            "MAX_JOBS": str(jobs),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }

    def run(self, command, log, **options):
        options = {"cwd": self.folder, "env": self.environment} | options
        return self.processes.run(command, log, **options)

    def python(self, code, log, **options):
        return self.run([sys.executable, "-c", code], log, **options)

    def follow(self):
        """Make the copy's files the tree's, and leave those that are."""
        if self.changed.exists():  # killed with a fault in it: nothing built there is of use
            shutil.rmtree(self.folder, ignore_errors=True)
            self.built.unlink(missing_ok=True)
            self.changed.unlink()
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
        for name in names:
            there = self.folder / name
            if not there.exists() or not filecmp.cmp(ROOT / name, there, shallow=False):
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, there)
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            built = name.parts[0] == "build" or path.suffix == ".so"
            if path.is_file() and not built and str(name) not in names:
                path.unlink()

    # -- the extension

    @property
    def library(self):
        return next(self.folder.glob("kdkernels/_C*.so"))

    def extension_sources(self):
        files = [self.folder / "setup.py", *self.folder.glob("csrc/**/*")]
        files = [f for f in files if f.is_file() and f.parent.name != "cuda"]
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(str(file).encode() + file.read_bytes())
        return digest.hexdigest()

    def build_extension(self, log):
        """Everything of it, from the tree's own sources."""
        sources = self.extension_sources()
        if self.built.exists() and self.built.read_text() == sources:
            return
        self.built.unlink(missing_ok=True)
        code, *_ = self.python(BUILD, log, env=self.environment | {"MAX_JOBS": str(CORES)})
        if code != 0:
            raise SystemExit(f"kdkernels: the tree itself does not build: see {log}")
        kept = self.kept()
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for file in [*self.objects(), self.library]:
            shutil.copy2(file, kept / file.name)
        self.built.write_text(sources)

    def kept(self):
        return WORK / f"{self.folder.name}-kept"

    def objects(self):
        return sorted(self.folder.glob("build/torch*-cpu/csrc/**/*.o"))

    def compile_extension(self, fault, log):
        """What the fault changes of it: of the ISA levels, the one that runs here."""
        kernels = ("dispatch.o", f"isa_{self.isa}.o")
        below_ops = ("csrc/cpu/", "csrc/math/", "csrc/params.h", "csrc/row_task.h")
        if fault.file.startswith(below_ops):
            changed = [o for o in self.objects() if o.name in kernels]
        else:
            changed = [o for o in self.objects() if o.parent.name != "cpu"]
        folder = next(self.folder.glob("build/torch*-cpu"))
        ninja = [sys.executable, "-m", "ninja", "-C", folder, *changed]
        code, seconds, user = self.run(ninja, log)
        if code == 0:
            link = [*self.link, "-o", self.library, *self.objects(), *self.libraries]
            code, *more = self.run(link, log)
            seconds, user = seconds + more[0], user + more[1]
        return code, seconds, user

    def restore_extension(self):
        for file in [*self.objects(), self.library]:
            kept = self.kept() / file.name
            if file.stat().st_mtime_ns != kept.stat().st_mtime_ns:
                shutil.copy2(kept, file)

    def learn_extension(self, log):
        """The level that runs, and how the library is linked."""
        path = WORK / "extension.json"
        code = (
            "import json, sys, torch, setup; e = setup.make_extension(torch, None);"
            "import kdkernels._C as C;"
            "json.dump([C.build_info()['isa'], e.library_dirs, e.libraries, e.extra_link_args],"
            " open(sys.argv[1], 'w'))"
        )
        if self.run([sys.executable, "-c", code, path], log)[0] != 0:
            raise SystemExit(f"kdkernels: the extension of the tree does not load: see {log}")
        self.isa, folders, libraries, more = json.loads(path.read_text())
        self.link = shlex.split(os.environ.get("CXX", "c++")) + ["-shared", *more]
        # Behind the objects, whose symbols a linker looks for there.
        self.libraries = [f"-L{folder}" for folder in folders]
        self.libraries += [f"-l{name}" for name in libraries]

    # -- the launchers

    def build_launchers(self, log):
        """Those of the tree, and a list of their objects."""
        if self.launchers is None:
            code, *_ = self.python(BUILD_LAUNCHERS, log)
            if code != 0:
                raise SystemExit(f"kdkernels: the tree's kernels do not build: see {log}")
            self.launchers = json.loads((self.folder / "build/launchers.json").read_text())

    def kept_objects(self, fault):
        """A header's fault is compiled into one of the sources; the others' objects are kept."""
        if kind(fault) != "kernels" or not fault.file.endswith(("h", "cuh")):
            return {}
        source = fault.source or SOURCES.get(Path(fault.file).name, "sweeps.cu")
        kept = {file: made for file, made in self.launchers.items() if Path(file).name != source}
        return {"KDKERNELS_KEPT_OBJECTS": json.dumps(kept)}

    # -- a fault

    def build(self, fault, log):
        if kind(fault) == "extension":
            return self.compile_extension(fault, log)
        if kind(fault) == "python":
            return 0, 0.0, 0.0
        return self.python(BUILD_LAUNCHERS, log, env=self.environment | self.kept_objects(fault))

    def attempt(self, fault):
        log = WORK / "logs" / f"{fault.name}.log"
        log.unlink(missing_ok=True)
        result = Result(fault.name, fault.file, "error")
        file = self.folder / fault.file
        before, times = file.read_text(), file.stat()
        if kind(fault) == "kernels":
            self.build_launchers(WORK / "logs" / "tree.log")
        since = time.time() - 1
        self.changed.touch()
        try:
            file.write_text(before.replace(fault.text, fault.instead))
            code, result.build, result.user = self.build(fault, log)
            if code != 0:
                result.by = f"it does not compile: see {log.relative_to(ROOT)}"
                return result
            environment = self.environment | self.kept_objects(fault)
            tests = pytest("-x", *shlex.split(fault.tests))
            code, result.tests, user = self.run(tests, log, env=environment, limit=LIMIT)
            result.user += user
            result.status, result.by = verdict(code, log.read_text(errors="replace"), fault)
            return result
        finally:
            if kind(fault) == "extension" and self.kept().exists():
                self.restore_extension()
            file.write_text(before)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            for folder in self.folder.glob("build/ptx/*"):  # libraries; their objects stay
                if folder.name != "objects" and folder.stat().st_mtime > since:
                    shutil.rmtree(folder)
            self.changed.unlink()


# A third of what -O3 takes.
BUILD = """
import setup, sys
setup.CXX_FLAGS = ["-O1" if flag == "-O3" else flag for flag in setup.CXX_FLAGS]
sys.argv = ["setup.py", "-q", "build_ext", "--inplace", "--force"]
setup.main()
"""
BUILD_LAUNCHERS = """
import json, launchers
launchers.build()
json.dump(launchers.objects(), open("build/launchers.json", "w"))
"""
# The source that shows a header's fault, where it is not sweeps.cu.
SOURCES = {"divergence.cuh": "divergence.cu", "elements.cuh": "noise.cu", "bits.cuh": "update.cu"}


def pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rfE", "--no-header"]
    return [*command, "-p", "no:cacheprovider", *arguments]


def kind(fault):
    """What has to be built again: extension, kernels (of CUDA, for the emulator), python."""
    if not fault.file.startswith("csrc/"):
        return "python"
    kernels = fault.file.startswith("csrc/cuda/") or "test_launchers.py" in fault.tests
    return "kernels" if kernels else "extension"


FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)
STARTED = re.compile(
    r"^(tests/\S+::.+?)(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|Fatal Python error).*)?$",
    re.MULTILINE,
)


def verdict(code, said, fault):
    """(status, by)"""
    tests = FAILED.findall(said)
    started = STARTED.findall(said)
    if code == 0 and not re.search(r"\d+ passed", said):
        return "error", "all of its tests were skipped"
    if code == 0:
        return ("no fault", fault.no_fault) if fault.no_fault else ("survived", "")
    if fault.no_fault and (code is None or code == 1 or code < 0):
        return "error", "it is said to be no fault, and a test fails"
    if code is None:
        return "killed", f"timeout: {started[-1] if started else 'before any test'}"
    if code == 1 and "ERROR collecting" not in said and tests:
        return "killed", tests[0]
    if code < 0 and started:
        return "killed", f"crash: {started[-1]}"
    if code == 5:
        return "error", "its tests are not there: pytest found none"
    return "error", f"pytest ended with {code}: see build/mutants/logs/{fault.name}.log"


# ---- all of them --------------------------------------------------------------------------------


def chosen(names):
    found = [f for f in FAULTS if not names or any(fnmatch.fnmatch(f.name, n) for n in names)]
    unknown = [n for n in names if not any(fnmatch.fnmatch(f.name, n) for f in FAULTS)]
    if unknown:
        raise SystemExit(f"kdkernels: no fault is called {', '.join(unknown)}")
    return found


class Session:
    """The faults of one call."""

    def __init__(self, faults):
        self.faults, self.processes = faults, Processes()
        extension = [f for f in faults if kind(f) != "kernels"]
        others = [f for f in faults if kind(f) == "kernels"]
        jobs = max(1, CORES // 2) if extension and others else CORES
        self.extension = Copy("extension", self.processes, jobs)
        self.others = Copy("others", self.processes, jobs)
        self.queues = {self.extension: extension, self.others: others}
        self.results, self.lock, self.errors, self.done = {}, threading.Lock(), [], {}

    def prepare(self):
        print("kdkernels: building the tree as it is, in build/mutants", flush=True)
        (WORK / "logs").mkdir(parents=True, exist_ok=True)
        log = WORK / "logs" / "tree.log"
        log.unlink(missing_ok=True)
        for copy in self.queues:
            copy.follow()
        self.extension.build_extension(log)
        self.extension.learn_extension(log)
        library = self.extension.library
        shutil.copy2(library, self.others.folder / "kdkernels" / library.name)

    def take(self, copy):
        """The next fault of a copy's own, or one of the kernels', or None."""
        with self.lock:
            queue = self.queues[copy] or self.queues[self.others]
            return queue.pop(0) if queue else None

    def work(self, copy):
        try:
            while fault := self.take(copy):
                self.note(copy.attempt(fault))
        except Stopped:
            pass
        except BaseException as error:  # a worker's fault is the session's
            self.errors.append(error)
            self.processes.stop()
        finally:
            for other in self.queues:  # has the cores to itself from now on
                other.environment["MAX_JOBS"] = str(CORES)
            self.done[copy].set()

    def note(self, result):
        with self.lock:
            self.results[result.name] = result
            self.write()
            place = f"[{len(self.results)}/{len(self.faults)}]"
            times = f"build {result.build:.0f} s, tests {result.tests:.0f} s"
            print(f"{place} {result.status}  {result.name}  ({times})  {result.by}", flush=True)

    def write(self):
        order = {fault.name: i for i, fault in enumerate(FAULTS)}
        rows = sorted(self.results.values(), key=lambda r: order[r.name])
        (WORK / "result.json").write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        )
        return rows

    def run(self):
        try:
            self.prepare()
            for copy in self.queues:
                self.done[copy] = threading.Event()
                threading.Thread(target=self.work, args=(copy,)).start()
            # Not by Thread.join, which takes a thread for ended once Ctrl-C has interrupted it.
            for done in self.done.values():
                done.wait()
            if self.errors:
                raise self.errors[0]
            self.confirm()
        finally:
            self.processes.stop()
            for done in self.done.values():  # the copies are the tree's again
                done.wait()

    def confirm(self):
        """The tests that failed pass without any fault."""
        results = [r for r in self.results.values() if r.status == "killed"]
        if not results:
            return
        tests = list(dict.fromkeys(re.sub("^(timeout|crash): ", "", r.by) for r in results))
        print(f"kdkernels: {len(tests)} tests once more, without a fault", flush=True)
        log = WORK / "logs" / "without.log"
        log.unlink(missing_ok=True)
        code, *_ = self.others.run(pytest(*tests), log)
        failed = FAILED.findall(log.read_text(errors="replace"))
        if code != 0 and not failed:
            raise SystemExit(f"kdkernels: pytest ended with {code} without a fault: see {log}")
        for result in results:
            if any(result.by.endswith(test) for test in failed):
                result.status, result.by = "error", f"fails without the fault too: {result.by}"
        self.write()


def table(rows, seconds):
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.status:9} {row.name:{width}} {row.build:5.0f} {row.tests:5.0f}  {row.by}")
    names = ("killed", "survived", "no fault", "error")
    count = {name: sum(row.status == name for row in rows) for name in names}
    words = ", ".join(f"{number} {status}" for status, number in count.items())
    user = sum(row.user for row in rows)
    print(f"{words}; {seconds / 60:.0f} minutes, {user / 60:.0f} of processor time")
    return count["survived"] + count["error"]


def main(names):
    faults = chosen(names)
    wrong = [f"{fault.name}: {fault.stale(ROOT)}" for fault in faults if fault.stale(ROOT)]
    if wrong:
        raise SystemExit("kdkernels: the list of faults is stale:\n  " + "\n  ".join(wrong))
    if importlib.util.find_spec("ninja") is None:
        raise SystemExit("kdkernels: the faults' builds need ninja: run `pip install ninja`.")
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("kdkernels: another process works in build/mutants") from None
        began, session, status = time.monotonic(), Session(faults), 0
        try:
            session.run()
        except KeyboardInterrupt:
            status = 130
        rows = session.write() if session.results else []
        bad = table(rows, time.monotonic() - began) if rows else 0
    return status or (1 if bad else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
