# CUDA 13 with nvcc, Python 3.12, torch 2.11 and megatron-core 0.19.2, as constraints.txt pins them.
#
#   docker build -t megatron-rw .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data megatron-rw \
#       torchrun --nproc-per-node 8 pretrain_gpt_rw.py ...
#
# Transformer Engine, for fused attention, FP8 and context parallelism:
#   docker build --build-arg EXTRAS=te -t megatron-rw:te .
#
# Not built where this project is developed, which has no Docker engine.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev git \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3.12 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/megatron-rw
# The dependencies first: they change less often than the code, and are 5 GB.
COPY constraints.txt pyproject.toml README.md LICENSE pretrain_gpt_rw.py ./
COPY megatron_rw/__init__.py megatron_rw/__init__.py
ARG EXTRAS=quickstart
RUN pip install --no-cache-dir -c constraints.txt -e ".[${EXTRAS}]"
COPY . .
# The CUDA kernels, for Ampere, Hopper, Blackwell and later.
RUN MEGATRON_RW_BUILD_CUDA=1 pip install --no-cache-dir --no-build-isolation --no-deps -e .

# Ordinary users write their runs elsewhere; nothing here needs root.
CMD ["python", "pretrain_gpt_rw.py", "--help"]
