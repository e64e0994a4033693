# The two commands of the README, and those of a developer. All use .venv and need no root.
SHELL := bash
PYTEST := .venv/bin/python -m pytest
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV

.PHONY: quickstart test lint types clean venv

quickstart:
	@bash launch/quickstart.sh

venv:
	@bash launch/setup_venv.sh quickstart dev

# Every test is in exactly one tier; the quick one comes first, in two processes: it is one thread's work.
test: venv
	@echo "--- unit"
	@OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not (distributed or real)"
	@echo "--- distributed"
	@$(PYTEST) -m "distributed and not real"
	@echo "--- real: SmolLM2"
	@$(PYTEST) -m real

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck launch/*.sh launch/slurm/* .ci/run

types: venv
	.venv/bin/mypy

# Leaves .venv and runs/ alone.
clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
