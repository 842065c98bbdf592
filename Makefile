PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-slow lint bench

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	@test -d demo/out/bundle || { echo "There is no bundle yet: run make demo first."; exit 2; }
	$(BIN)/packlight bench demo/out/bundle --against demo/whisper-tiny.en --data demo/speech

# A stamp file, so that an interrupted installation is not taken for a finished one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[fit,dev]'
	touch $@
