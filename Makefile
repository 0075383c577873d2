# make reproduce   build everything and run both experiments; needs Python >= 3.11 and a C++ compiler
# make test        build and run the tests
# make lint        check the style of Python and C++; make format puts it right
# make bench       build and run the benchmarks; gpu-test and gpu-bench the CUDA ones
#
# PYTHON=python3.12   which Python makes .venv          TORCH=2.11.0 TORCHVISION=0.26.0   other versions
# KDKERNELS_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS are explained in setup.py.

PYTHON ?= python3
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CXX_FILES := $(shell find csrc -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu" 2>/dev/null)
SOURCES := setup.py pyproject.toml $(CXX_FILES)
TOOLS := .venv/tools-torch-$(TORCH)
# Another setting of these is another build.
BUILT := .venv/built-$(TORCH)-$(or $(KDKERNELS_CUDA),auto)-$(or $(subst ;,_,$(TORCH_CUDA_ARCH_LIST)),default)

.PHONY: setup reproduce test lint format bench gpu-test gpu-bench gpu clean
.DELETE_ON_ERROR:

setup: $(BUILT)

reproduce: setup
	$(BIN)/kdkernels reproduce

test: setup
	@$(BIN)/python -m pytest

bench: setup
	@$(BIN)/python -m pytest bench --benchmark-only

gpu-test: gpu
	@$(BIN)/python -m pytest -m gpu

gpu-bench: gpu
	@$(BIN)/python -m pytest bench -m gpu --benchmark-only

gpu: setup
	@$(BIN)/python -c "import torch; raise SystemExit(None if torch.cuda.is_available() else \
	  'kdkernels: torch sees no CUDA GPU here; run this on a machine with one (\`nvidia-smi\` lists them).')"
	@$(BIN)/python -c "import kdkernels._C as C; raise SystemExit(None if C.build_info()['cuda'] else \
	  'kdkernels: this build is for the CPU only; run \`make clean\`, then \`KDKERNELS_CUDA=1 make setup\`.')"

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

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

# Only the C++ files that changed are compiled again.
$(BUILT): $(TOOLS) $(SOURCES)
	@echo "building kdkernels (a minute or two, and then only what changed)"
	@$(PIP) -q install --no-build-isolation --no-deps -e .
	@$(BIN)/python -m kdkernels info
	@rm -f .venv/built-* && touch $@
