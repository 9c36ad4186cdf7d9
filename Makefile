# make train | demo | test | docs | lab | readme | help
VENV   ?= .venv
BIN    ?= $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch==2.13.0
STAMP  ?= $(VENV)/.installed
README ?= README.md
LOCK   ?=
ARGS   ?=

export OMP_WAIT_POLICY ?= PASSIVE
EXACTLY = $(addprefix -c ,$(LOCK))
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help venv train fusion compute pretrain demo test soak docs lock lab readme safety clean
.DEFAULT_GOAL := help

help:
	@echo 'make train    draw SynthPEDES, train the full model, test it     (ARGS="-p variant baseline -p seed 1")'
	@echo 'make pretrain the two towers that tiny starts from, anew       (weights/; four minutes of one core)'
	@echo 'make demo     search people by description, in the browser        (ARGS="--model runs/... --folder pictures/")'
	@echo 'make fusion   every fusion on the frozen towers of runs          (ARGS="-p run runs/synth/tiny/full/seed0 -p seeds 3")'
	@echo 'make test     lint, all notebooks, all tests'
	@echo 'make soak     20 kills, 2 and 4 processes, damaged answers and files, 40 minutes of training watched, SLURM where it is installed'
	@echo 'make docs     the site, in _docs/html: notebooks, reference, tables, figures, search'
	@echo 'make lock     requirements/lock.txt from the ranges in pyproject.toml'
	@echo 'make lab      the notebooks in JupyterLab'
	@echo 'make readme   README.md from nbs/index.ipynb'
	@echo 'make safety   known vulnerabilities of the installed packages      (pip-audit; needs the network)'
	@echo 'make venv     the virtual environment alone                      (TORCH=... for another build of PyTorch)'
	@echo '              LOCK=requirements/lock.txt: exactly the versions that were tried'
	@echo 'make clean    delete build and cache folders; .venv, runs and data stay'

# PyTorch first, where it is not there or asked for: the build stays when the package asks for torch
GIVEN = $(filter command environment,$(origin TORCH) $(origin LOCK))
ifneq ($(GIVEN),)
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 venv'; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(if $(GIVEN),,$(BIN)/python -c 'import torch' 2>/dev/null ||) $(BIN)/python -m pip install --quiet $(EXACTLY) $(TORCH)
	$(BIN)/python -m pip install --quiet $(EXACTLY) -e '.[dev]'
	@touch $@

venv: $(STAMP)

train: $(STAMP)
	@mkdir -p runs
	$(BIN)/papermill nbs/train.ipynb runs/train.ipynb -p dataset synth $(ARGS)

pretrain: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -c "from bdam_repro.pretrain import pretrain; pretrain('data', 'weights')"

demo: $(STAMP)
	@$(BIN)/python -c 'import gradio' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[demo]'
	@$(ONE_THREAD) $(BIN)/python -c 'from bdam_repro.demo import demo_main; demo_main()' $(ARGS)

fusion: $(STAMP)
	@mkdir -p runs
	$(ONE_THREAD) $(BIN)/papermill nbs/fusion.ipynb runs/fusion.ipynb $(ARGS)

compute: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -c 'from bdam_repro.compute import write_compute; write_compute()'

test: $(STAMP)
	$(BIN)/ruff check .
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2 --timing
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile

# 20 kills: 5 of each kind. An hour in all on a quiet machine. Both parts of SLURM need root and its packages:
# the test is skipped without, and the grid is left out (see the heads of test_slurm.py and slurm/run.sh)
soak: $(STAMP)
	BDAM_KILLS=5 BDAM_SOAK=1 $(ONE_THREAD) $(BIN)/python -m pytest tests/test_resume.py tests/test_distributed.py
	$(ONE_THREAD) $(BIN)/python -m pytest -m soak -rs tests/soak tests/test_slurm.py tests/test_offline_gpu.py
	if command -v slurmctld >/dev/null && [ "$$(id -u)" = 0 ]; then BIN=$(abspath $(BIN)) tests/slurm/run.sh; fi

# Nothing is run and the package is not imported, so PyTorch is not needed. npm brings MathJax once
docs:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 docs'; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import myst_nb, sphinx_book_theme, sphinx_copybutton' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet $(EXACTLY) $$($(BIN)/python docs/build.py --needs)
	$(BIN)/python docs/build.py

# The CPU build of PyTorch: the CUDA libraries of other builds belong to the machine, and are left out.
# The versions that the file has stay where they can; UPGRADE=--upgrade takes the newest
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet 'uv>=0.9'
	echo '$(TORCH)' > requirements/.torch.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --extra dev --extra docs --extra log --extra paper \
	  --constraints requirements/.torch.txt --no-annotate --no-header --no-emit-index-url --no-emit-find-links $(UPGRADE) \
	  --output-file requirements/lock.txt
	sed -i -E '/^(nvidia-|cuda-|triton)/d' requirements/lock.txt
	rm requirements/.torch.txt

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

readme: $(STAMP)
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags=remove_input --TagRemovePreprocessor.remove_cell_tags=remove_cell \
	  --stdout nbs/index.ipynb > $(README).raw
	@cat -s $(README).raw | sed -E "s,\]\(\.\./,](,g; s,\]\(([0-9a-z_]+\.ipynb),](nbs/\1,g" > $(README).tmp
	@mv $(README).tmp $(README) && rm $(README).raw

# asks the index about every installed package: not a part of `make test`
safety: $(STAMP)
	@$(BIN)/python -c 'import pip_audit' 2>/dev/null || $(BIN)/python -m pip install --quiet 'pip-audit>=2.7,<3'
	$(BIN)/python -m pip_audit --skip-editable --progress-spinner off

clean:
	rm -rf build dist _docs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

include workflow/paper.mk
