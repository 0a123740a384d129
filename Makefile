# The commands of the README. Everything runs inside .venv, which `make env` builds.
.PHONY: env demo test check format clean

env:
	@scripts/env

demo: env
	@scripts/demo

test: env
	@scripts/test

check: env
	@scripts/check

format: env
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv demo-output dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
