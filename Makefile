# make demo    sets everything up, trains a small DN-DETR on built-in data, evaluates and draws it
# make test    sets everything up and runs the tests
# make setup   only sets up: a .venv with torch, detectron2 and this project
#
#   PYTHON=python3.12    the interpreter that the .venv is made from (3.10 to 3.13)
#   DETECTRON2=...       a folder, a wheel or an address to install detectron2 from
#   STRICT=1             fail where detectron2 is missing, rather than do what works without it
#   PYTEST_ARGS=...      further arguments for pytest

PYTHON ?= python3

.PHONY: demo test setup

demo: setup
	@bash scripts/demo.sh

test: setup
	@.venv/bin/python -m pytest $(PYTEST_ARGS)

setup:
	@$(PYTHON) scripts/setup_env.py
