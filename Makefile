# Everything runs in .venv, which `make setup` fills; each target sets up what it needs.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

# A Python of another environment may have left its library path here; ours sets its own.
ifdef _ROS_WHEELS_BOOTSTRAP_COMPLETE
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE
unexport LD_LIBRARY_PATH
endif

.PHONY: help setup demo test test-all test-noble lint bench bench-quality bench-gpu cuda clean clean-venv

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup:  ## create .venv with everything pinned
	@pip/setup.sh $(PYTHON)

SOURCE = $(or $(IMAGES),$(VIDEO),$(BAG))
demo: setup  ## map a sequence into out/; IMAGES=… VIDEO=… BAG=… [TOPIC=…] for your own, VIEW=1 to watch
	$(BIN)/stac-ros demo $(if $(SOURCE),"source:=$(SOURCE)") $(if $(TOPIC),"topic:=$(TOPIC)") \
	    $(if $(VIEW),viewer:=true)

test: setup  ## the everyday tests
	$(BIN)/pytest -n 3 -q

test-all: setup  ## also the slow ones
	$(BIN)/pytest -n 3 -q -m "not gpu"

test-noble: .venv/noble  ## what meets ROS and images, with the libraries of Ubuntu 24.04
	PYTHONPATH=$(CURDIR)/$< $(BIN)/pytest -n 3 -q test/ros test/evaluation test/worlds

.venv/noble: pip/noble.txt | setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	touch $@

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## what model, node, cache modes and cloud measures cost on this computer
	$(BIN)/python -m stac_core.evaluation.speed
	$(BIN)/python -m stac_ros.benchmark
	$(BIN)/python -m stac_core.evaluation.cache_benchmark
	$(BIN)/python -m stac_core.evaluation.benchmark

bench-quality: setup  ## what cache modes and switches cost in quality, with the bundled network; hours
	$(BIN)/python -m stac_core.evaluation.cache_quality

bench-gpu: setup  ## check and time the kernels and the full-size network on a GPU
	$(BIN)/python -m stac_core.evaluation.benchmark_gpu

cuda: setup  ## build the CUDA kernels; needs nvcc (CUDA_HOME)
	$(BIN)/pip install --no-build-isolation --no-deps ./cuda_ext

clean:  ## remove what was built and mapped
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

clean-venv:  ## remove the environment too
	rm -rf .venv
