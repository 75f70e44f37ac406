# The demo images: `make images` builds hello, go and jvm from Debian packages. Included by the top Makefile, which
# sets ORRERY (the command) and IMAGE_DIR (where images go). Only installing packages needs
# root.

IMAGE_WORK = target/image-work
KERNEL_DEB = target/packages/kernel.deb
DEMOS = guest-image/demos
# What every image is made with, beside its own demo.
IMAGE_SOURCES = guest-image/images.mk $(wildcard guest-image/src/*.rs guest-image/init/src/*.rs)

# The demos show their workload alone: not even the kernel's remark that the machine has no PCI.
DEMO_FLAGS = --kernel $(KERNEL_DEB) --cmdline loglevel=3

.PHONY: deps images clean-images

deps: ## Debian packages that building images takes: installs what is missing (as root), or says so
	@sh guest-image/deps.sh

images: $(IMAGE_DIR)/hello.img $(IMAGE_DIR)/go.img $(IMAGE_DIR)/jvm.img ## the demo images: hello, go, jvm

clean-images: ## the demo images and what they were made of, but not the kernel package
	rm -rf $(IMAGE_WORK) $(IMAGE_DIR)

# Debian's stock kernel, as it comes. The newest package that is there is kept; delete target/packages for a newer one.
$(KERNEL_DEB): guest-image/fetch-kernel.sh | deps
	sh guest-image/fetch-kernel.sh $@

$(IMAGE_DIR)/hello.img: $(KERNEL_DEB) $(wildcard $(DEMOS)/hello/*) $(IMAGE_SOURCES) | deps build
	sh $(DEMOS)/hello/make-root.sh $(IMAGE_WORK)/hello
	@mkdir -p $(@D)
	$(ORRERY) image build $(DEMO_FLAGS) --root $(IMAGE_WORK)/hello --hostname hello -o $@ -- /bin/hello.sh

$(IMAGE_DIR)/go.img: $(KERNEL_DEB) $(wildcard $(DEMOS)/go/*) $(IMAGE_SOURCES) | deps build
	sh $(DEMOS)/go/make-root.sh $(IMAGE_WORK)/go
	@mkdir -p $(@D)
	$(ORRERY) image build $(DEMO_FLAGS) --root $(IMAGE_WORK)/go --hostname go -o $@ -- /bin/demo

$(IMAGE_DIR)/jvm.img: $(KERNEL_DEB) $(wildcard $(DEMOS)/jvm/*) $(IMAGE_SOURCES) | deps build
	sh $(DEMOS)/jvm/make-root.sh $(IMAGE_WORK)/jvm
	@mkdir -p $(@D)
	$(ORRERY) image build $(DEMO_FLAGS) --root $(IMAGE_WORK)/jvm --hostname jvm \
		--env JAVA_HOME=/opt/java -o $@ -- /app/demo.sh
