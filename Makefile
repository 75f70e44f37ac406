# Orrery: what one types in this house. `make help` lists the targets.

CARGO ?= cargo
ORRERY = $(or $(CARGO_TARGET_DIR),target)/release/orrery
IMAGE_DIR = target/images

.PHONY: help all build test test-debug test-engines oracle conformance test-svm test-snapshots metamorphic demo bench bench-images bench-snapshots clean
help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

all: build

build: ## the orrery command, optimised, in target/release
	$(CARGO) build --release --locked -p orrery-vmm

test: build images ## formatting, lints, every test, and the debugger's with fewer moments
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release --locked -- -D warnings
	$(CARGO) test --workspace --release --locked
	python3 tests/debug/run.py --orrery $(ORRERY) --images $(IMAGE_DIR) --count 50

# Images: `make images` builds hello, go and jvm; `make deps`, which it calls, installs Debian packages (as root).
-include guest-image/images.mk

oracle: ## the engine against the host processor and against KVM; COUNT=n runs n times as many cases, SEED=n others
	@log=$$(mktemp) && trap 'rm -f $$log' EXIT && failed=0; \
	for oracle in oracle kvm; do \
		ORACLE_COUNT=$(or $(COUNT),1) ORACLE_SEED=$(or $(SEED),0) \
		KVM_ORACLE_COUNT=$(or $(COUNT),1) KVM_ORACLE_SEED=$(or $(SEED),0) \
			$(CARGO) test --release --locked -p orrery-cpu --test $$oracle >$$log 2>&1 || failed=1; \
		cat $$log; grep -E '^(host|KVM) oracle' $$log >>$$log.totals || failed=1; \
	done; \
	cat $$log.totals; rm -f $$log.totals; exit $$failed

test-svm: ## tests on a KVM that has SVM, in QEMU: those of tests/svm/list; COUNT=n as for oracle, SVM='...' for more flags
	KVM_ORACLE_COUNT=$(or $(COUNT),1) $(CARGO) run --release --locked -p orrery-tests --bin svm -- $(SVM)

metamorphic: build images ## hello, go and jvm, disturbed in all that must not matter; COUNT=n perturbed runs each, SEED=s
	@for image in hello go jvm; do \
		$(ORRERY) verify $(IMAGE_DIR)/$$image.img --seed $(or $(SEED),1) --perturb --times $$(($(or $(COUNT),5) + 1)) || exit 1; \
	done

conformance: build ## suites by others, run as guests and compared with docs/conformance.md; see there
	$(CARGO) build --release --locked -p orrery-guest-image --example bare_image
	ORRERY=$(ORRERY) sh tests/conformance/run.sh $(SUITES)

test-debug: build images ## whole guests debugged with gdb, forwards and backwards: breakpoints, races, shells, 1000 random moments
	python3 tests/debug/run.py --orrery $(ORRERY) --images $(IMAGE_DIR)

test-snapshots: build images ## the long test of snapshots: random moments, seeds, kills
	sh vmm/snapshots.sh $(ORRERY) $(IMAGE_DIR)
	ORRERY_KILLS=200 $(CARGO) test --release --locked -p orrery-vmm --test runs killed -- --nocapture

test-engines: build images $(IMAGE_DIR)/etcd.img ## the long test of engines: whole runs in each, hash chains compared
	sh vmm/engines.sh $(ORRERY) $(IMAGE_DIR)

# etcd under a load that is short enough for many runs.
$(IMAGE_DIR)/etcd.img: $(KERNEL_DEB) $(wildcard tests/bench/etcd/*) $(IMAGE_SOURCES) | deps build
	$(CARGO) run --release --locked -p orrery-tests --bin bench -- --prepare --only etcd-put-get
	$(ORRERY) image build --kernel $(KERNEL_DEB) --root target/bench/etcd-root -o $@ -- /bin/bench /usr/bin/etcd etcd-put-get 50

demo: build images ## each image twice with one seed and once with another
	@for image in hello go jvm; do sh vmm/demo.sh $(ORRERY) $(IMAGE_DIR)/$$image.img || exit 1; done

bench: build images bench-deps ## the benchmark: native, QEMU, Orrery; figures in target/bench.json
	$(CARGO) run --release --locked -p orrery-tests --bin bench --

bench-images: images ## the benchmark's images alone: c, go, jvm and etcd in target/bench
	$(CARGO) run --release --locked -p orrery-tests --bin bench -- --prepare

.PHONY: bench-deps
bench-deps: deps
	@sh guest-image/deps.sh bench

# Debian's etcd as it comes; delete target/packages for a newer one.
target/packages/etcd-server.deb: tests/bench/etcd/fetch.sh
	sh tests/bench/etcd/fetch.sh $@

bench-snapshots: images ## branches, going back, snapshots; figures in target/bench-snapshots.json
	$(CARGO) run --release --locked -p orrery-tests --bin bench-snapshots --

.PHONY: bench-debug
bench-debug: build ## going to random moments of a long run, and back from there; figures in target/bench-debug.json
	$(CARGO) run --release --locked -p orrery-tests --bin bench-debug --

.PHONY: fuzz
fuzz: ## one fuzz target, or each in turn: TARGET=code|paging|devices|formats, SECONDS=n (60); see docs/fuzzing.md
	sh tests/fuzz/run.sh "$(TARGET)" "$(or $(SECONDS),60)"

clean: ## everything that was built
	$(CARGO) clean
