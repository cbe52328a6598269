# make demo    fine-tune the embedded base model on the embedded records unless done, then open the chat
# make model   the same without the chat
# make test    lint and all tests
# Each sets up .venv by itself, and again when a requirement file changes. PORT=8000 changes the chat's port.

PORT ?= 7860
PYTHON ?= python3

.PHONY: demo model test lint clean

demo: model
	.venv/bin/python app.py --model models/demo --port $(PORT)

model: .venv/users
	@test -f models/demo/config.json || .venv/bin/python train.py --config configs/demo.yaml

test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/developers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/users: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Dolly needs Python 3.11 or later; set PYTHON=python3.12, for example"; exit 1; }
	@echo "installing the packages into .venv, a few minutes the first time"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

.venv/developers: .venv/users requirements-dev.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf .venv models .pytest_cache .ruff_cache
