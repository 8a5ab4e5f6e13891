# syntax=docker/dockerfile:1
# One file, two images: `docker build .` for a CPU, `docker build --build-arg DEVICE=gpu .` for an NVIDIA GPU.
# Stages go from what seldom changes to what often does: a change of code re-sends one small layer.
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS base
# libnuma1: vLLM's CPU kernels are linked against it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin refrain \
    && install -d -o refrain -g refrain /data
WORKDIR /opt/refrain

# Locked wheels only (their digests are in deploy/lock), so no compiler is needed to build this.
# Byte code is written now, because a read-only container cannot keep any: the engine starts seconds sooner.
# uv leaves an empty .lock that everybody may write; here and below it goes.
FROM base AS dependencies
ARG DEVICE
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
COPY pyproject.toml ./
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache \
    python deploy/install.py --device "$DEVICE" --without-project \
    && rm -f .venv/.lock

FROM dependencies AS project
COPY README.md LICENSE ./
COPY app app
RUN .venv/bin/uv pip install --python .venv/bin/python --no-deps --no-build-isolation --target project . \
    && rm -f project/.lock

FROM base AS final
ARG DEVICE
# No compiler, but for a GPU: there Triton compiles its kernels' launchers with one when the engine starts.
RUN if [ "$DEVICE" = gpu ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=dependencies /opt/refrain/.venv /opt/refrain/.venv
COPY --from=project /opt/refrain/project /opt/refrain/project
ENV PATH=/opt/refrain/project/bin:/opt/refrain/.venv/bin:$PATH \
    PYTHONPATH=/opt/refrain/project \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/data \
    REFRAIN_HOME=/data \
    REFRAIN_HOST=0.0.0.0
# All that is ever written: weights, keys, caches (/data) and /tmp. The root file system can be read-only.
WORKDIR /data
VOLUME ["/data"]
USER 10001:10001
EXPOSE 8000
# Alive, not ready: /healthz answers while the engine still loads, and /readyz is the one to route by.
# At the very first start nothing answers until the weights have been fetched: hence the long start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-I", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('REFRAIN_PORT', '8000') + '/healthz', timeout=4)"]
ENTRYPOINT ["refrain"]
CMD ["serve"]
