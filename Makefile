# make reproduce   build everything and run experiments 1 and 2; needs Python >= 3.11 and a C++ compiler
# make quick       build and run what fails first: every op on the CPU, each kernel family emulated
# make test        build and run the tests (12 minutes on two cores)
# make nightly     these and what is too long for every change: see CONTRIBUTING.md
# make mutants     put small faults into the sources, one at a time, and see that tests fail (an hour);
#                  ARGS="NAME ..." those alone
# make fuzz        random calls of the public ops against the reference (4 minutes); N=100000 SEED=0
# make lint        check the style of Python and C++; make format puts it right
# make bench       the benchmarks beside what people use, into bench/results (10 minutes); ARGS="-k noise" and others
# make bench-full  the same for all sizes, with more rounds (an hour)
# make peers       the losses against TRL's, Liger-Kernel's and others, installed beside .venv
# make accuracy     what fused linear losses in bf16 lose, ours and the peers', into bench/results
# make docs        the site of documentation, into build/docs; its code is run and its pictures drawn
# make wheel       sdist and manylinux wheel for this Python and torch, into dist
# make stubs       kdkernels/_C.pyi, for type checkers, after a change of the bindings
# make compile-commands   compile_commands.json, for clangd and others
# make counts      what the CUDA kernels and their peers cost on an H100, counted without one; of any loss
#                  ARGS="--losses js --classes 1000 --gap 0.1 far" and others: ARGS=--help
# make gpu-test    the tests that need a GPU; SANITIZE=1 runs them under each tool of compute-sanitizer
# make gpu-bench   the benchmarks on a GPU, into bench/results; ARGS="--only noise" and others: ARGS=--help
#
# PYTHON=python3.12   which Python makes .venv          TORCH=2.11.0 TORCHVISION=0.26.0   other versions
# KDKERNELS_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS are explained in setup.py.

PYTHON ?= python3
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CXX_FILES = $(shell find $(1) -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu" 2>/dev/null)
SOURCES := setup.py pyproject.toml $(call CXX_FILES,csrc)
TOOLS := .venv/tools-torch-$(TORCH)
# Another setting of these is another build.
ARCHS := $(or $(subst $() ,_,$(subst ;,_,$(TORCH_CUDA_ARCH_LIST))),default)
BUILT := .venv/built-$(TORCH)-$(or $(KDKERNELS_CUDA),auto)-$(ARCHS)

# Where $(PYTHON) has a torch with CUDA, gpu-test and gpu-bench use it as it is and build in place,
# without pip or a network; else they use .venv.
ifneq ($(filter gpu gpu-%,$(MAKECMDGOALS)),)
HOST := $(shell $(PYTHON) -c "import sys, torch; torch.version.cuda and \
  print(torch.__version__, sys.implementation.cache_tag, sep='-')" 2>/dev/null)
endif
GPU_PYTHON := $(if $(HOST),$(PYTHON),$(BIN)/python)
IN_PLACE := build/in-place-$(HOST)-$(or $(KDKERNELS_CUDA),1)-$(ARCHS)
# bench/peers.py knows where these versions differ from us. Of those alone only a file or two run.
PEERS := trl==1.16.0 liger-kernel==0.8.5 torchdistill==1.1.5 opacus==1.6.0
PEERS_ALONE := mmrazor==1.0.0 axolotl==0.19.0 verl==0.9.1
PEERS_BUILT := build/peers/built-$(TORCH)-$(subst $() ,-,$(PEERS))
GPU_TESTS = $(shell grep -l "mark\.gpu" tests/test_*.py)
SITE_PACKAGES = $(shell $(GPU_PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
SANITIZER = $(firstword $(shell command -v compute-sanitizer) $(wildcard $(addsuffix \
  /bin/compute-sanitizer,$(CUDA_HOME) /usr/local/cuda /usr/local/cuda-* $(SITE_PACKAGES)/nvidia/*)))

.PHONY: setup reproduce quick test nightly fuzz mutants lint format bench bench-full peers accuracy docs wheel counts gpu-test gpu-bench gpu gpu-seen clean
.DELETE_ON_ERROR:

setup: $(BUILT)

reproduce: setup
	$(BIN)/kdkernels reproduce

# A worker a core; tests/conftest.py divides the tests among them.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8

quick: setup
	@KDKERNELS_EMULATED_ARCH=90 $(PYTEST) -m quick $(shell grep -l "mark\.quick" tests/test_*.py)

test: setup
	@$(PYTEST) --durations=25

nightly: setup
	@KDKERNELS_NIGHTLY=1 $(PYTEST) --durations=25

fuzz: setup
	@PYTHONPATH=tests $(BIN)/python -m fuzz --calls $(or $(N),100000) --seed $(or $(SEED),0)

mutants: setup
	@PYTHONPATH=tests $(BIN)/python -m mutants.run $(ARGS)

bench: $(PEERS_BUILT) setup
	@build/peers/bin/python -m pytest bench -vv --benchmark-only --benchmark-quiet $(ARGS)

bench-full: $(PEERS_BUILT) setup
	@build/peers/bin/python -m pytest bench -vv --benchmark-only --benchmark-quiet --full --compare-seconds 20 $(ARGS)

counts: setup
	@$(PIP) -q install --no-deps liger-kernel
	@$(BIN)/python bench/counts.py $(ARGS)

peers: $(PEERS_BUILT) setup
	@build/peers/bin/python bench/peers.py $(ARGS)

accuracy: $(PEERS_BUILT) setup
	@build/peers/bin/python bench/accuracy.py $(ARGS)

docs: setup
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "the site is in build/docs: open build/docs/index.html"

wheel: $(TOOLS)
	@echo "building dist/ (a minute or two)"
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --no-isolation --outdir dist . > build/wheel.log 2>&1 || \
	  { cat build/wheel.log; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c "$$REPAIR" dist/*-linux_*.whl
	@ls dist/*

.PHONY: stubs compile-commands
stubs: setup
	@$(BIN)/python csrc/stubs.py

compile-commands: setup
	@$(BIN)/ninja -C $$(dirname $$(ls -t build/*/build.ninja | head -1)) -t compdb > compile_commands.json

# As cibuildwheel does it.
define REPAIR
import pathlib, subprocess, sys, tomllib
command = tomllib.load(open('pyproject.toml', 'rb'))['tool']['cibuildwheel']['linux']['repair-wheel-command']
for wheel in sys.argv[1:]:
    subprocess.run(command.format(dest_dir='dist', wheel=wheel), shell=True, check=True)
    pathlib.Path(wheel).unlink()
endef
export REPAIR

gpu-test: gpu
	@$(GPU_PYTHON) -c "$$NEEDS" pytest hypothesis numpy scipy
ifeq ($(filter-out 0,$(SANITIZE)),)
	@$(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS)
else
	@test -n "$(SANITIZER)" || { echo "kdkernels: no compute-sanitizer on PATH, in CUDA_HOME or in" \
	  "/usr/local/cuda*: install NVIDIA's CUDA toolkit, or run" \
	  "\`$(GPU_PYTHON) -m pip install nvidia-cuda-sanitizer-api\`."; exit 1; }
	@# An allocation a tensor, so that what lies beyond a tensor is out of bounds. The tool may end well
	@# though the tests crashed: then there is no report.
	@for tool in memcheck racecheck synccheck initcheck; do \
	  echo "compute-sanitizer --tool $$tool"; rm -f build/$$tool.xml; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 9 \
	    --target-processes application-only --report-api-errors no --kernel-name kns=kdkernels \
	    $(GPU_PYTHON) -m pytest -m gpu --junitxml=build/$$tool.xml $(GPU_TESTS) && \
	  test -s build/$$tool.xml || { echo "kdkernels: $$tool found errors, or the tests failed."; exit 1; }; \
	done
endif

gpu-bench: gpu
	@$(GPU_PYTHON) -m bench.gpu $(ARGS)

gpu: gpu-seen $(if $(HOST),$(IN_PLACE),$(BUILT))
	@$(GPU_PYTHON) -c "import kdkernels._C as C; raise SystemExit(None if C.build_info()['cuda'] else \
	  'kdkernels: this build is for the CPU only; run \`make clean\`, then \`KDKERNELS_CUDA=1 make setup\`.')"

gpu-seen: $(if $(HOST),,$(TOOLS))
	@$(GPU_PYTHON) -c "import torch; raise SystemExit(None if torch.cuda.is_available() else \
	  'kdkernels: torch sees no CUDA GPU here; run this on a machine with one (\`nvidia-smi\` lists them).')"

$(IN_PLACE): $(SOURCES) | gpu-seen
	@echo "building kdkernels for the torch of $(PYTHON) (some minutes, and then only what changed)"
	@KDKERNELS_CUDA=$(or $(KDKERNELS_CUDA),1) $(PYTHON) setup.py -q build_ext --inplace --force
	@rm -f .venv/built-* build/in-place-* && touch $@

define NEEDS
import importlib.util, sys
missing = ' '.join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None)
if missing:
    raise SystemExit(f'kdkernels: the tests need {missing}: run `{sys.executable} -m pip install {missing}`.')
endef
export NEEDS

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(call CXX_FILES,csrc tests)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(call CXX_FILES,csrc tests)

clean:
	rm -rf .venv build dist runs *.egg-info kdkernels/*.so

# torch and everything else that the project needs to build, to run and to be checked.
$(TOOLS): pyproject.toml
	@$(PYTHON) -c "import sys; raise SystemExit(None if sys.version_info >= (3, 11) else \
	  'kdkernels: Python ' + sys.version.split()[0] + ' is too old; name a newer one: \`make PYTHON=python3.12\`.')"
	@test -x $(BIN)/python || { echo "making .venv with $$($(PYTHON) --version)" && $(PYTHON) -m venv .venv; }
	@echo "installing torch $(TORCH), torchvision $(TORCHVISION) and the tools (2 GB, some minutes)"
	@$(PIP) -qq install "torch==$(TORCH)" "torchvision==$(TORCHVISION)" setuptools wheel ninja \
	  $$($(BIN)/python -c "$$EXTRAS")
	@rm -f .venv/tools-torch-* && touch $@

define EXTRAS
import tomllib
extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']
print(*(name for names in extras.values() for name in names if not name.startswith('kdkernels')))
endef
export EXTRAS

# A venv that sees .venv: what the peers need comes beside it, and .venv keeps its versions.
$(PEERS_BUILT): $(TOOLS)
	@echo "installing $(PEERS) and what they need into build/peers (500 MB)"
	@rm -rf build/peers && $(BIN)/python -m venv --without-pip build/peers
	@echo "import site; site.addsitedir('$(SITE_PACKAGES)')" > \
	  $$(build/peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	@echo "torch==$(TORCH)" > build/peers/constraints.txt
	@build/peers/bin/python -m pip --disable-pip-version-check --no-input -q install \
	  -c build/peers/constraints.txt $(PEERS)
	@build/peers/bin/python -m pip --disable-pip-version-check --no-input -q install --no-deps $(PEERS_ALONE)
	@touch $@

# Only the C++ files that changed are compiled again.
$(BUILT): $(TOOLS) $(SOURCES)
	@echo "building kdkernels (a minute or two, and then only what changed)"
	@$(PIP) -q install --no-build-isolation --no-deps -e .
	@$(BIN)/python -m kdkernels info
	@rm -f .venv/built-* build/in-place-* && touch $@
