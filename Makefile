# Everything runs inside .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test stress bench-faults bench-transport bench-overlap bench-system bench-reuse bench-control bench-overload bench-simulate test-rdma check install clean
install: $(STAMP)

# torch first and alone: the pinned release is taken wherever pip is told to look for it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt -e '.[mooncake-cpu]' || echo "no wheel of mooncake for this Python: its tests are skipped"
	touch $@

demo: $(STAMP)
	$(BIN)/aiodisagg demo

# A file's tests stay together: some share a model.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# 50,000 (and 25,000 stricter) worlds; prints how far it is.
stress: $(STAMP)
	$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/protocol/test_world.py --hypothesis-profile long

# Real processes under load while one is killed, stopped, or cut off; the last needs root and iproute2.
bench-faults: $(STAMP)
	$(BIN)/aiodisagg bench faults --scenario kill --rounds 20 --json docs/faults-kill.json
	$(BIN)/aiodisagg bench faults --scenario bootstrap --rounds 3 --json docs/faults-bootstrap.json
	$(BIN)/aiodisagg bench faults --scenario stop --rounds 5 --json docs/faults-stop.json
	$(BIN)/aiodisagg bench faults --scenario netcut --transports stream --rounds 5 --json docs/faults-netcut-stream.json

# Every data plane beside the bare limit of its path; root and iproute2.
bench-transport: $(STAMP)
	$(BIN)/aiodisagg bench transport --netns --json docs/transports.json --plot docs/transports.png

# Prefill while images arrive against waiting for all of them; two cores, a quarter of an hour each.
bench-overlap: $(STAMP)
	$(BIN)/aiodisagg bench overlap --json docs/overlap.json
	$(BIN)/aiodisagg bench overlap --itl-budget-ms 0 --json docs/overlap-no-budget.json

# Shapes of the same two cores under the same load, and what the simulator says of them: half an hour of a quiet machine.
bench-system: $(STAMP)
	$(BIN)/aiodisagg bench times --json docs/times.json
	$(BIN)/aiodisagg bench system --shapes dp2-inline,1+1-waits,1+1,2both --mixes images-1-8,servegen --seeds 0 \
		--requests 32 --json docs/system.json --plot docs/system.png
	$(BIN)/aiodisagg simulate --compare docs/system.json --small --times docs/times.json --json docs/system-simulated.json

# Pictures that come again, with caches and without; two cores, a quarter of an hour.
bench-reuse: $(STAMP)
	$(BIN)/aiodisagg bench reuse --json docs/reuse.json

bench-control: $(STAMP)
	$(BIN)/aiodisagg bench control --json docs/control.json

bench-overload: $(STAMP)
	$(BIN)/aiodisagg bench overload --json docs/overload.json

# Fills the tables of docs/simulate.md; most of an hour.
bench-simulate: $(STAMP)
	$(BIN)/aiodisagg bench simulate

# mooncake over verbs in an emulated machine with soft-RoCE; see tests/rdma/run.sh.
test-rdma: $(STAMP)
	bash tests/rdma/run.sh

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
