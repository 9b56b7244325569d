# Two commands for a newcomer: `make quickstart` and `make test`. Both set up .venv first and skip what is done.
PYTHON ?= python3
BIN := .venv/bin
# torch without CUDA takes 4.6 GB less: cpu, cuda, or auto, which is cpu where there is no NVIDIA driver.
TORCH ?= auto
TORCH_CPU ?= https://download.pytorch.org/whl/cpu

.PHONY: quickstart quickstart-data test test-slow test-faults test-ffcv gpu-report lint clean

quickstart: .venv/main.done quickstart-data  ## watch BYOL learn on this machine
	$(BIN)/python train.py --config configs/quickstart.yaml --resume auto

quickstart-data: $(foreach split,train val,datasets/quickstart-shards/$(split)/manifest.json)

datasets/quickstart-images: | .venv/main.done
	$(BIN)/python tools/quickstart_images.py $@

datasets/quickstart-shards/%/manifest.json: | datasets/quickstart-images
	$(BIN)/python tools/make_shards.py datasets/quickstart-images/$* datasets/quickstart-shards/$*

test: .venv/test.done  ## all tests but the slow ones and those that break whole runs
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not faults"

test-slow: .venv/test.done  ## the slow ones
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not faults"

test-faults: .venv/test.done  ## whole runs, killed, stopped and damaged
	$(BIN)/pytest -n 2 --dist loadfile -m faults

test-ffcv: .venv/test.done  ## with ffcv itself, which is built into .venv/ffcv and seen by these tests alone
	tools/install_ffcv.sh .venv/ffcv $(BIN)/python
	PYTHONPATH=.venv/ffcv $(BIN)/python -c 'import ffcv.loader'
	PYTHONPATH=.venv/ffcv $(BIN)/pytest tests/test_ffcv.py

gpu-report: .venv/test.done  ## five minutes on a GPU: tests, speed and memory, written to benchmarks/<card>
	$(BIN)/python tools/gpu_report.py

lint: .venv/dev.done  ## format, lint, types, and that imports run one way
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

# main, test and dev are what is installed: the package alone, with its test extra, with its dev extra. DALI is the
# build for torch's CUDA. Either build runs without a GPU; they share files, so the other one is removed first.
.venv/main.done: EXTRA =
.venv/test.done: EXTRA = ,test
.venv/dev.done: EXTRA = ,dev
.venv/%.done: setup.cfg constraints.txt | $(BIN)/python
	@echo "installing byolt and its libraries into .venv: 2 to 6 GB the first time, which takes minutes"
	@seconds=0; (while sleep 1 >&- 2>&-; do seconds=$$((seconds + 1)); \
	  [ $$((seconds % 15)) -ne 0 ] || echo "  $$seconds s, $$(du -sh .venv | cut -f1) installed"; done) & \
	trap "kill $$!" EXIT; set -e; \
	install="$(BIN)/pip install --quiet --constraint constraints.txt"; torch=$(TORCH); \
	[ $$torch != auto ] || nvidia-smi > /dev/null 2>&1 || torch=cpu; \
	[ $$torch != cpu ] || $$install --retries 1 --timeout 15 --no-deps --index-url $(TORCH_CPU) torch torchvision \
	  > /dev/null 2>&1 || true; \
	$$install torch torchvision; \
	cuda=$$($(BIN)/python -c 'import torch; print(torch.version.cuda or "")'); \
	[ $$torch != cpu ] || [ -z "$$cuda" ] || \
	  echo "torch is the build for CUDA, 4.6 GB larger: it was here before, or $(TORCH_CPU) has none for CPUs"; \
	case "$$cuda" in \
	  12.*) dali=dali other=13;; \
	  *) dali=dali-cuda130 other=12;; \
	esac; \
	$(BIN)/pip uninstall --quiet --quiet --yes nvidia-dali-cuda$${other}0 \
	  $$(printf "nvidia-%s-cu$$other " nvimgcodec libnvcomp nvjpeg2k nvtiff); \
	$$install --editable ".[$$dali$(EXTRA)]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "byolt needs Python 3.10 or newer; $(PYTHON) is older: make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

clean:  ## remove the environment and the quickstart's files
	rm -rf .venv datasets/quickstart-images datasets/quickstart-shards runs/quickstart
