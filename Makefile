# make demo    fine-tune the embedded base model on the embedded records unless done, then open the chat
# make model   the same without the chat
# make test    lint and all tests
# make bench-training    speed beside TRL's and that of 2023; ARGS="--help" lists what it takes
# Each sets up .venv by itself, and again when a requirement file changes. PORT=8000 changes the chat's port.

PORT ?= 7860
PYTHON ?= python3

.PHONY: demo model test lint bench-training clean

demo: model
	.venv/bin/python app.py --model models/demo --port $(PORT)

model: .venv/users
	@test -f models/demo/config.json || .venv/bin/python train.py --config configs/demo.yaml

test: lint .venv/transformers-4
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/developers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench-training: .venv/benchmarks
	.venv/bin/python -m benchmarks.training $(ARGS)

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

# Packages are tested in transformers 4 too, with the torch of .venv.
.venv/transformers-4: .venv/developers
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
	  transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 requests==2.32.5 urllib3==2.6.3 charset-normalizer==3.4.4
	@touch $@

.venv/benchmarks: .venv/users benchmarks/requirements.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	@touch $@

clean:
	rm -rf .venv models .pytest_cache .ruff_cache
