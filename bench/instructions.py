"""Instructions an element of the CPU kernels' hot loops: figures that no busy machine moves.

    python bench/instructions.py            counts, beside the figures in instructions.json
    python bench/instructions.py --write    keeps today's

callgrind counts what one thread executes between the start and the end of a kernel's call, at the
ISA levels that it knows (AVX2 at most). tests/test_instructions.py says when a change makes a case
worse. The figures hold for one compiler version; another has figures of its own.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "bench/instructions.json"
ISA = "avx2"
WORSE = 1.05  # times the kept figure


def compiler():
    """The compiler's command, and the version that its figures hold for; None without one."""
    command = os.environ.get("CXX", "g++").split()
    if shutil.which(command[0]) is None:
        return command, None
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return command, shown.splitlines()[0]


def build(folder):
    """The program of instructions.cpp with the CPU kernels, compiled as setup.py does."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    program = Path(folder, "instructions")
    sources = [ROOT / "bench/instructions.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    jobs, objects = [], []
    for source in sources:
        objects.append(Path(folder, source.stem + ".o"))
        flags = [*setup["CXX_FLAGS"], "-I", ROOT / "csrc", "-c", source, "-o", objects[-1]]
        if source.stem.startswith("isa_") and source.stem != f"isa_{ISA}":
            flags.append("-O0")  # it does not run
        jobs.append(subprocess.Popen([*compiler()[0], *flags]))
    if any(job.wait() for job in jobs):
        raise RuntimeError("the kernels do not compile; the compiler's message is above")
    subprocess.run([*compiler()[0], *objects, "-fopenmp", "-o", program], check=True)
    return program


def count(program, case):
    """Instructions an element."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += ["--collect-atstart=no", "--toggle-collect=measured", program, case]
    environment = os.environ | {"KDKERNELS_ISA": ISA, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    collected = re.search(r"Collected\s*: (\d+)", done.stderr)
    return int(collected[1]) / int(done.stdout)


def counts():
    """{case: instructions an element} of every case."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        cases = subprocess.run([program], capture_output=True, text=True, check=True).stdout
        return {case: round(count(program, case), 2) for case in cases.splitlines()}


def kept():
    """The figures of FIGURES: {"compiler": ..., "isa": ..., "an element": {case: figure}}."""
    return json.loads(FIGURES.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep these figures")
    write = parser.parse_args().write
    old = kept()["an element"] if FIGURES.exists() else {}
    new = counts()
    for case, figure in new.items():
        before = f"{figure / old[case] - 1:+7.1%} of {old[case]:.2f}" if case in old else "new"
        print(f"{case:32}{figure:9.2f}  {before}")
    if write:
        figures = {"compiler": compiler()[1], "isa": ISA, "an element": new}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
