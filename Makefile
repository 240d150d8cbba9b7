# Every target does its own set-up: python3 (3.11 or newer) and make are all it needs.
# `make` alone lists the targets.

PYTHON ?= python3

# Which build of torch: `default` is PyPI's (with CUDA on Linux, several GB); `cpu` is the small one; any other
# name that uv's --torch-backend knows (cu128, rocm7.1, auto, ...) works too. The last choice is remembered.
ifndef TORCH
TORCH := $(shell cat .venv/torch 2>/dev/null || echo default)
endif

READY := .venv/ready-$(TORCH)
FIGURES := $(shell sed -n 's/^\[\([A-Za-z0-9_-]*\)\].*/\1/p' paper/figures.toml 2>/dev/null)

# uv fills .venv, whatever environment is active outside, and with the build of torch asked for here.
export UV_PYTHON := .venv/bin/python
unexport UV_TORCH_BACKEND
# Bytecode is kept, also where Python is told elsewhere to write none: or each process compiles torch's modules anew.
unexport PYTHONDONTWRITEBYTECODE
ifneq ($(TORCH),default)
export UV_FIND_LINKS ?= $(shell echo "$$PIP_FIND_LINKS" | tr -s ' ' ,)
endif

.PHONY: help figures $(FIGURES) report verify archive html test kernels lint env lab lock clean-env

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Each makes the environment first if it must; TORCH=cpu asks for the small build of torch."

figures: $(FIGURES) ## Draw every figure and table of paper/figures.toml that is out of date (safe with -j)
	@.venv/bin/python -m repro claims --total
	@echo "Each claim, with its numbers: paper/tables/claims.md"

$(FIGURES): $(READY)
	@.venv/bin/python -m repro render $@

claims: $(filter-out claims,$(FIGURES))  # which are read by it

report: claims $(READY) ## Set the replication report, paper/report.pdf, after all that it shows
	@.venv/bin/python -m repro report $(ARGS)

verify: $(READY) ## Draw everything anew beside what is committed, and compare; ARGS="--level records" takes a minute
	@.venv/bin/python -m repro verify $(ARGS)

archive: $(READY) ## Pack code, records and outputs into one .zip in build/, with checksums, for Zenodo and the like
	@.venv/bin/python -m repro archive $(ARGS)

html: $(FIGURES) ## Draw what is out of date, then write it all as pages to browse, from build/site/index.html on
	@.venv/bin/python -m repro site $(ARGS)

test: $(READY) ## Run the tests; ARGS="-k samplers" runs some of them
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

kernels: $(READY) ## Add Triton (Linux), which TORCH=cpu leaves out: its interpreter tests the GPU kernels on a CPU
	@awk '/^[a-z]/ { keep = /^triton==/ } keep' requirements.lock > .venv/triton.lock
	@.venv/bin/uv pip install --quiet --no-deps --require-hashes -r .venv/triton.lock

lint: $(READY) ## Check style, formatting, and that notebooks carry no outputs
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m nbstripout --verify notebooks/*.ipynb

env: $(READY) ## Make the environment and nothing else

lab: $(READY) ## Open the notebooks in JupyterLab, explore.ipynb first
	@.venv/bin/python -m jupyterlab --notebook-dir=. notebooks/explore.ipynb

lock: | .venv/uv ## Regenerate requirements.lock from pyproject.toml; ARGS=--upgrade takes newer versions
	@env -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL .venv/bin/uv pip compile --quiet $(ARGS) \
		--universal --python-version 3.11 --fork-strategy fewest --generate-hashes --group dev \
		--no-config --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		pyproject.toml --output-file requirements.lock

clean-env: ## Remove .venv, to start over (after an upgrade of python3, say)
	rm -rf .venv

# Set-up. The stamps are written last, so an interrupted set-up is taken up again.

.venv/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is not. Name one: make PYTHON=python3.12"; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@rm -rf .venv; mkdir .venv; echo $(TORCH) > .venv/torch
	@$(PYTHON) -m venv .venv
	@awk '/^[a-z]/ { keep = /^uv==/ } keep' requirements.lock > .venv/uv.lock
	@.venv/bin/python -m pip install --quiet --require-hashes --no-deps -r .venv/uv.lock
	@touch $@

.venv/ready-default: requirements.lock pyproject.toml | .venv/uv
	@rm -f .venv/ready-*; echo default > .venv/torch
	.venv/bin/uv pip sync --require-hashes requirements.lock
	.venv/bin/uv pip install --no-deps --no-build-isolation --editable .
	@touch $@

# The other builds of torch have other files than PyPI's, so other hashes than the lock's: torch and torchvision
# come without a hash, in the lock's version; everything else is checked as ever. Wheels that your pip is told of
# (PIP_FIND_LINKS) come before PyTorch's own index: a machine that cannot reach it can hold torch there.
.venv/ready-%: requirements.lock pyproject.toml | .venv/uv
	@.venv/bin/uv pip install --torch-backend $* --help >/dev/null
	@rm -f .venv/ready-*; echo $* > .venv/torch
	@awk '/^[a-z]/ { keep = !/^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/ } keep' requirements.lock > .venv/rest.lock
	.venv/bin/uv pip sync --require-hashes .venv/rest.lock
	@test -z "$$UV_FIND_LINKS" || .venv/bin/uv pip install --no-deps $(call pin,torch)+$* $(call pin,torchvision) || true
	.venv/bin/uv pip install --torch-backend $* $(call pin,torch) $(call pin,torchvision)
	.venv/bin/uv pip install --no-deps --no-build-isolation --editable .
	@touch $@

pin = $(shell sed -n 's/^\($(1)==[^ ]*\).*/\1/p' requirements.lock)
