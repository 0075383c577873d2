"""Instructions per eager call on small tensors, where Python and PyTorch take the time.

    python bench/overhead.py

callgrind counts what one thread executes in 100 calls, at the ISA level that it knows (AVX2): a
figure that no busy machine moves. It holds for one version of Python and of PyTorch.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from instructions import compiler

CALLS = 100
# What valgrind does for the program that it runs.
REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void forget(void) { CALLGRIND_ZERO_STATS; }
void keep(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def cases():
    """{name: a call}."""
    import torch

    import kdkernels
    from kdkernels.tools.comparisons import training_logits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher, labels = training_logits(64, 10, 0.1)
    student.requires_grad_()
    tensors = [torch.randn(10 + i) for i in range(8)]
    parameters = [torch.randn(10 + i, requires_grad=True) for i in range(8)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = kdkernels.NoisyAdamW(parameters, lr=1e-3, std=0.1, seed=1)

    def loss(*given):
        student.grad = None
        kdkernels.distillation_loss(student, teacher, *given, temperature=2.0).backward()

    return {
        "distillation_loss of 64 x 10, forward and backward": loss,
        "distillation_loss with labels": lambda: loss(labels),
        "add_noise_ on 8 tensors": lambda: kdkernels.add_noise_(tensors, 0.1, seed=1, step=2),
        "NoisyAdamW.step on 8 tensors": optimizer.step,
    }


def measured(library):
    """What runs under valgrind."""
    requests = ctypes.CDLL(library)
    calls = cases()
    for call in calls.values():
        call()
    requests.start()
    for name, call in calls.items():
        call()
        requests.forget()
        for _ in range(CALLS):
            call()
        requests.keep(name.encode())


def main():
    if shutil.which("valgrind") is None:
        raise SystemExit("kdkernels: the counts need valgrind: run `apt-get install valgrind`.")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "requests.c"), Path(folder, "requests.so")
        source.write_text(REQUESTS)
        subprocess.run(
            [*compiler()[0], "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True
        )
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", sys.executable]
        command += [Path(__file__).resolve(), "--measured", library]
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        for path in sorted(Path(folder).glob("callgrind.out.*.*"), key=lambda p: int(p.suffix[1:])):
            said = path.read_text()
            if name := re.search(r"^desc: Trigger: Client Request: (.*)$", said, re.MULTILINE):
                total = re.search(r"^summary: (\d+)", said, re.MULTILINE)
                print(f"{name[1]:52}{int(total[1]) / CALLS:10,.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        measured(sys.argv[2])
    else:
        main()
