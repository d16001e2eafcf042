# Every target does its own set-up in .venv; only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch thread per process is fastest on shared cores; tests run one process a core.
export OMP_NUM_THREADS ?= 1

.PHONY: bench bench-store check check-real clean demo docs fmt gpu-proof micro micro-i2v setup site \
	test test-gpu test-lowest test-newest test-slow

# What the package itself needs: enough for the demo. On Linux without a GPU, PyTorch for CPUs is
# smaller: make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wanlora needs Python 3.11 or newer; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# The development tools beside it.
$(VENV)/.installed: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.installed

demo: $(VENV)/.package
	$(BIN)/wanlora demo --output-dir outputs/demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup -m 'not slow and not gpu'

test-slow: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Before each release: the tests without constraints.txt, each set in its own environment of 6 to
# 8 GB. uv finds the lowest set, and ignores an index or a limit that this machine gives to pip.
# The last results: docs/faq.md, "Which versions are tested?".
# The newest release of every dependency: make test-newest PYTHON=python3.13
NEWEST := .venv-newest/bin
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST)/python -m pip install --quiet uv
	$(NEWEST)/uv pip install --quiet --python $(NEWEST)/python --upgrade --editable '.[dev]'
	$(NEWEST)/mypy --cache-dir .venv-newest/mypy
	$(NEWEST)/python -m pytest -n auto --dist loadgroup -m 'not slow and not gpu'

# The lowest release that pyproject.toml allows, of the extras too: make test-lowest PYTHON=python3.11
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install --quiet uv
	$(LOWEST)/uv pip compile --quiet --python $(LOWEST)/python --resolution lowest-direct \
		--extra s3 --extra ray --extra prodigy --extra scenes \
		--output-file .venv-lowest/lowest.txt pyproject.toml
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python \
		--requirement .venv-lowest/lowest.txt --editable '.[dev]'
	$(LOWEST)/python -m pytest -n auto --dist loadgroup -m 'not slow and not gpu'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python docs/generate.py

# The documentation as a site, in site/. A broken link or anchor is an error.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# On a machine with the real weights, or to download them: make check-real MODEL=folder-or-hub-id
MODEL ?= Wan-AI/Wan2.1-T2V-1.3B-Diffusers
check-real: setup
	$(BIN)/python bench/check_real.py --model $(MODEL)

# The embedded model, from random weights: about 130 minutes on one core; continues after an
# interruption. On a GPU: make micro DEVICE=cuda
DEVICE ?= cpu
micro: $(VENV)/.package
	$(BIN)/python -m tools.micro.pretrain --work-dir outputs/micro --device $(DEVICE)

# Not in the package: an image-to-video model, from the embedded text-to-video model.
micro-i2v: $(VENV)/.package
	$(BIN)/python -m tools.micro.image_to_video --work-dir outputs/micro-i2v \
		--output outputs/micro-i2v/model --device $(DEVICE)

# On a GPU the real sizes; elsewhere a tiny model, which measures nothing.
bench: setup
	$(BIN)/python bench/step.py

# What this GPU shows, within 9 minutes: rates, correctness, steps beside baselines, encoders, 14B.
gpu-proof: setup
	$(BIN)/python bench/gpu_proof.py

bench-store: setup
	$(BIN)/python bench/store.py
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/stage_one.py

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis site
