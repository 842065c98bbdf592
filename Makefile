PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# What the bake-off and the ablation are run on; `make demo` gets both.
MODEL ?= demo/whisper-tiny.en
SAMPLES ?= demo/calibration

# The GNU C library keeps large tensors that come and go for the next step: an epoch of a picture tower took 76 to 103 s,
# and 131 s where their memory went back to the system each time.
KEEPING := MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000 MALLOC_MMAP_THRESHOLD_=4000000000

.PHONY: demo demo-images model-images test test-slow lint bench bakeoff ablation

demo: $(READY)
	$(BIN)/python examples/demo.py

demo-images: $(READY)
	$(BIN)/pip install --quiet resvg-py==0.5.0
	$(BIN)/python examples/demo_images.py

model-images: $(READY)
	$(BIN)/pip install --quiet resvg-py==0.5.0
	$(KEEPING) $(BIN)/python examples/clipart/train.py -o demo/clipart/model

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

bakeoff: .bake/ready
	@test -d "$(SAMPLES)" || { echo "There are no recordings at $(SAMPLES): run make demo first, or name some with SAMPLES=DIR MODEL=DIR."; exit 2; }
	.bake/bin/python benchmarks/bakeoff.py $(MODEL) --calibration $(SAMPLES) -o demo/bakeoff

ablation: $(READY)
	@test -d "$(SAMPLES)" || { echo "There are no recordings at $(SAMPLES): run make demo first, or name some with SAMPLES=DIR MODEL=DIR."; exit 2; }
	$(BIN)/python benchmarks/ablation.py $(MODEL) --calibration $(SAMPLES) --alone -o demo/ablation

# The libraries of the bake-off ask for versions of their own, so they get an environment of their own.
.bake/ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .bake
	.bake/bin/pip install -c constraints.txt -e '.[fit]' -r benchmarks/requirements.txt
	.bake/bin/pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0
	touch $@

# A stamp file, so that an interrupted installation is not taken for a finished one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[fit,dev]'
	touch $@
