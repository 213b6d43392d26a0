# Two images: `gpu`, the default, on NVIDIA's PyTorch image, and `cpu`, small, for the quick start.
#
#   docker build -t megatron-rw .
#   docker build --target cpu -t megatron-rw:cpu .
#   docker run --rm -v rw-runs:/runs megatron-rw:cpu       # the quick start, into /runs/quickstart
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#       --user "$(id -u):$(id -g)" -v /data:/data:ro -v /shared/runs:/runs megatron-rw \
#       torchrun --nproc-per-node 8 pretrain_gpt_rw.py <flags> \
#           --log-dir /runs/a --save /runs/a/checkpoints --load /runs/a/checkpoints
#
# Several nodes: the same on each, with /shared/runs on a file system that all of them see, and
#       --network=host --device=/dev/infiniband                             for docker run
#       --nnodes 8 --node-rank N --master-addr HOST --master-port 29500     for torchrun
# On SLURM, srun starts a container and a task for each GPU, without torchrun: see examples/slurm.
#
# Nothing runs as root. Without --user it is user 10001, whom a mounted folder must let write; with
# --user it is anyone: HOME and /runs are open to all.
# For the labels: --build-arg REVISION="$(git rev-parse HEAD)" --build-arg SOURCE=<URL>.
#
# What was tried. No image was built where this project is developed, which has no Docker engine.
#   cpu: the instructions below, read from this file, were carried out in a clean Debian trixie of
#        debootstrap, and the quick start ran there as user 10001 (tests/docker/clean_root.py), but
#        with the torch of the default index: the one in TORCH_INDEX could not be reached.
#   gpu: not built, not run. Its pip steps were tried, before cuda-core was among the packages, over
#        an empty package with the name and version of NVIDIA's torch, which stayed.
# The tags were found in files that others have published, not pulled; what is said below to be in
# NVIDIA's image comes from there too.

# What pyproject.toml needs, but for torch, and what the quick start draws with; the versions are in
# constraints.txt. Named here, so that a change of the code does not install everything again.
ARG DEPENDENCIES="megatron-core numpy sentencepiece tensorboard psutil tyro cuda-core cuda-bindings prometheus-client matplotlib scipy"

# ------------------------------------------------------------------------------------------ cpu
FROM debian:trixie-20260918-slim AS cpu

# Debian's mirrors keep only the newest 3.13.x.
RUN apt-get update \
    && apt-get install -y --no-install-recommends "python3=3.13.*" "python3-venv=3.13.*" \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv

# Any user id must find a name and a home, which caches go to.
RUN useradd --no-log-init --create-home --uid 10001 trainer \
    && mkdir /runs \
    && chmod 1777 /home/trainer /runs
ENV HOME=/home/trainer USER=trainer

WORKDIR /opt/megatron-rw
COPY constraints.txt ./
# PyTorch's own index has builds without CUDA, of which the default index's bring 2.7 GB.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch
ARG DEPENDENCIES
# Megatron 0.19.2 cannot be imported without Triton, which a torch without CUDA does not bring.
# hadolint ignore=SC2086
RUN pip install --no-cache-dir -c constraints.txt torch triton $DEPENDENCIES
COPY . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e .

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL \
    org.opencontainers.image.title="megatron-rw (CPU)" \
    org.opencontainers.image.description="Megatron pretraining with loss-based sample reweighting" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.source="$SOURCE"
USER 10001:10001
CMD ["python", "-m", "examples.quickstart.run", "--output-dir", "/runs/quickstart"]

# ------------------------------------------------------------------------------------------ gpu
# The later of the two images with torch 2.11 (26.02 and 26.03; 26.04 has 2.12).
# Known, from reports of its users: Python 3.12.3, torch 2.11.0a0+a6c236b9fd.nv26.03.46836102,
# CUDA 13.2, cuDNN 9.20, NCCL 2.29.7, Transformer Engine 2.13. constraints.txt, with which the tests
# run, has torch 2.11.0 and CUDA 13.0. Assumed: that apex, pip, awk and NVRTC, which compiles our
# kernels when a run starts, are in it; that a driver for CUDA 13, R580 or later, runs it.
FROM nvcr.io/nvidia/pytorch:26.03-py3 AS gpu

RUN useradd --no-log-init --create-home --uid 10001 trainer \
    && mkdir /runs \
    && chmod 1777 /home/trainer /runs
ENV HOME=/home/trainer USER=trainer

WORKDIR /opt/megatron-rw
COPY constraints.txt ./
ARG DEPENDENCIES
# What the image has stays, torch above all: its versions come first, ours are for what it lacks.
# The last line fails when pip has replaced or removed anything.
# hadolint ignore=SC2086
RUN pip list --format=freeze > /tmp/before.txt \
    && awk -F== '{name = tolower($1); gsub(/[_.]/, "-", name)} !seen[name]++' \
        /tmp/before.txt constraints.txt > /tmp/both.txt \
    && PIP_CONSTRAINT="" pip install --no-cache-dir -c /tmp/both.txt $DEPENDENCIES \
    && pip list --format=freeze > /tmp/after.txt \
    && ! grep -Fxv -f /tmp/after.txt /tmp/before.txt
COPY . .
# The image's setuptools may be older than pyproject.toml asks for.
RUN PIP_CONSTRAINT="" pip install --no-cache-dir -c constraints.txt \
        --target /tmp/build setuptools \
    && PIP_CONSTRAINT="" PYTHONPATH=/tmp/build pip install --no-cache-dir \
        --no-build-isolation --no-deps -e . \
    && rm -r /tmp/build

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL \
    org.opencontainers.image.title="megatron-rw" \
    org.opencontainers.image.description="Megatron pretraining with loss-based sample reweighting" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.source="$SOURCE"
USER 10001:10001
CMD ["python", "pretrain_gpt_rw.py", "--help"]
