# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-all test-oldest test-peers lint docs docs-serve reproduce evidence bench \
	bench-distributed gallery house check-pins clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# Every package is pinned by constraints*.txt. These do not reach isolated builds: the back ends that builds need are
# pinned there too, and installed first.
INSTALL := pip install --quiet --disable-pip-version-check --no-build-isolation
BACK_ENDS := editables hatchling setuptools

setup: $(VENV)/ready  ## create .venv and install the pinned dependencies

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/$(INSTALL) -c constraints.txt $(BACK_ENDS)
	@$(BIN)/$(INSTALL) -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: setup  ## train on 3,000 noisy digits and compare live and averaged weights (about 2 minutes)
	@$(BIN)/python examples/01_quickstart.py

reproduce: setup  ## train all semi-supervised methods with few labels and print their errors (70 runs)
	@$(BIN)/python benchmarks/reproduce.py

evidence: setup  ## measure what averaging buys, six questions on digits (about 2 minutes)
	@$(BIN)/python benchmarks/evidence.py

# two at a time; a file's tests stay together, since what they share takes long to make; the files in the order of the
# folders, which puts the long ones before the short ones
PYTEST := python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: setup  ## run the tests (7 minutes on two cores)
	@$(BIN)/$(PYTEST) -m "not slow"

test-all: setup  ## run the tests that `make test` leaves out: the widest matrices, examples and pages (6 minutes)
	@$(BIN)/$(PYTEST) -m slow

lint: setup  ## ruff (lint and format) and mypy (strict)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
docs: $(VENV)/docs  ## build the documentation site into dist/site, strictly
	@$(MKDOCS) build --strict  # not --quiet, under which warnings are not counted
	@echo "dist/site/index.html"

docs-serve: $(VENV)/docs  ## show the site at http://127.0.0.1:8000 while you write
	@$(MKDOCS) serve

$(VENV)/docs: $(VENV)/ready
	@$(BIN)/$(INSTALL) -c constraints.txt -e ".[docs]"
	@touch $@

OLDEST := .venv-oldest
test-oldest: $(OLDEST)/ready  ## run the tests against the oldest supported Lightning
	@$(OLDEST)/bin/$(PYTEST) -m "not slow" tests

$(OLDEST)/ready: pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt $(BACK_ENDS)
	@$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt -e ".[test]"
	@touch $@

# without their dependencies: these would bring torchvision, opencv and another torch
PEERS := accelerate diffusers einops ema-pytorch mmcv-lite mmdet mmengine nemo_toolkit peft stable-diffusion-sdkit \
	timm tokenizers torch-ema transformers ultralytics yolov5
# mmdetection 2 in a folder of its own, since its packages have the names of mmdetection 3's; its mmcv is built, which
# takes a setuptools that still has pkg_resources
MMDET2 := mmcv mmdet
PEERS_IMPORT := addict huggingface_hub importlib_metadata psutil regex requests rich termcolor yapf
test-peers: $(VENV)/peers  ## run recipes, imports and adapters against the systems themselves (mmdet, timm, YOLO, ...)
	@REQUIRE_PEERS=1 $(BIN)/python -m pytest -q tests/parity

$(VENV)/peers: $(VENV)/ready constraints-mmdet2.txt
	@$(BIN)/$(INSTALL) -c constraints.txt $(PEERS_IMPORT)
	@$(BIN)/$(INSTALL) -c constraints.txt --no-deps --no-compile $(PEERS)
	@rm -rf $(VENV)/mmdet2
	@$(BIN)/$(INSTALL) -c constraints-mmdet2.txt --no-deps --no-compile --target $(VENV)/mmdet2 $(MMDET2)
	@touch $@

check-pins: setup  ## name what is installed in the environments and pinned in no constraints file
	@$(BIN)/python .ci/check_pins.py

bench: setup  ## print what averaging costs, beside what other systems cost (10 minutes; test-peers installs them)
	@$(BIN)/python -W ignore benchmarks/bench.py

bench-distributed: setup  ## print what an average costs on each of 1, 2 and 4 processes (DDP, FSDP2)
	@$(BIN)/python benchmarks/distributed.py

gallery: setup  ## draw the pictures of docs/how-to/schedule-gallery.md
	@$(BIN)/python docs/gallery.py

house:  ## draw the picture of docs/explanation/design.md: which folder imports which
	@$(PYTHON) docs/house.py

clean:  ## remove the virtual environments and what runs have written
	rm -rf $(VENV) $(OLDEST) runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
