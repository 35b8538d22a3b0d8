# Two images of the same server, each in its own target:
#
#   docker build --target cpu -t sglang-diffusion:cpu .
#   docker build --target cuda -t sglang-diffusion:cuda .
#
#   docker run --rm --init --shm-size=1g -p 30000:30000 sglang-diffusion:cpu
#   docker run --rm --init --shm-size=1g --gpus all -p 30000:30000 \
#       -v sglang-models:/home/sglang/.cache/huggingface sglang-diffusion:cuda \
#       serve --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers
#
# --shm-size: decoded frames travel from the worker to the output process, and from there to whoever asked for them, as
# files in /dev/shm, which Docker limits to 64 MiB. A request holds up to 2 * frames * height * width * 3 bytes there: 185
# MiB for 81 frames of 832x480. Without room they go through /tmp on the container's disk, which is slower. Give
# that much for each request that runs at the same time; docs/deployment.md has a table.
#
# --init: the server is process 1 otherwise, and process 1 must reap the children of others.

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /src
COPY python python
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./python

FROM python:${PYTHON_VERSION}-slim AS base
RUN useradd --create-home --uid 1000 sglang && install -d -o sglang -g sglang /workspace /home/sglang/.cache/huggingface
# The port is published by Docker, so the server has to listen on more than the container's own loopback.
ENV SGLANG_DIFFUSION_HOST=0.0.0.0 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
EXPOSE 30000
# Healthy means that requests are taken: the model is loaded. /liveness answers earlier, as soon as the server listens.
HEALTHCHECK --interval=15s --timeout=6s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('SGLANG_DIFFUSION_PORT', '30000') + '/health', timeout=5)"]
ENTRYPOINT ["sglang"]
CMD ["serve"]

FROM base AS cpu
# PyTorch publishes builds without CUDA, which are much smaller, in an index of its own: --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=""
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$(ls /wheels/*.whl)[diffusion,s3]"
ENV SGLANG_DIFFUSION_DEVICE=cpu
USER sglang

FROM base AS cuda
# The default build of PyTorch brings the CUDA libraries along; the driver comes from the host (NVIDIA Container Toolkit).
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[diffusion,s3]"
ENV SGLANG_DIFFUSION_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER sglang
