PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check fmt bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml src/nestling/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/nestling run configs/demo.toml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/lending_overhead.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/kept_memory.py
	$(BIN)/python benchmarks/kill_resume.py
	$(BIN)/python benchmarks/arch_switch.py
	$(BIN)/python benchmarks/cost_counter.py
	$(BIN)/python benchmarks/timm_sweep.py
	$(BIN)/python benchmarks/convert_sweep.py
	$(BIN)/python benchmarks/search_efficiency.py
	$(BIN)/python benchmarks/search_overhead.py
	$(BIN)/python benchmarks/search_workers.py
	$(BIN)/python benchmarks/device_faults.py
	$(BIN)/python benchmarks/fleet.py
	$(BIN)/python benchmarks/timing_repeatability.py
	$(BIN)/python benchmarks/profile_agreement.py
	$(BIN)/python benchmarks/predictor.py
	$(BIN)/python benchmarks/quant_speed.py
	$(BIN)/python benchmarks/candidate_cost.py
	$(BIN)/nestling run configs/demo.toml
	$(BIN)/python benchmarks/verify_export.py runs/demo

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
