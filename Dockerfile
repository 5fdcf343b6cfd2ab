# syntax=docker/dockerfile:1
# Model Depot as an image. `docker build .` makes one for the CPU; `--build-arg DEVICE=gpu`, or
# `--target gpu`, one for NVIDIA GPUs (x86-64). How it is run: docs/docker.md.
#
# The base is pinned by tag. To pin it by digest as well (`docker buildx imagetools inspect` shows it):
#   --build-arg PYTHON=3.11.14-slim-bookworm@sha256:...
ARG PYTHON=3.11.14-slim-bookworm
ARG DEVICE=cpu

# Whatever installs. The environment gets no pip of its own: the base's works on it.
FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt ./

# What we depend on, as pyproject.toml has it. Of onnxruntime there are two, and each image has its own.
FROM build AS depends
RUN cp constraints.txt /opt/venv/ \
 && python -c 'import tomllib; found = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*(d for d in found["dependencies"] if not d.startswith("onnxruntime")), sep="\n")' > requirements.txt

# torch for the CPU is in an index of PyTorch's, which is asked for torch and for nothing else.
FROM depends AS depends-cpu
RUN pip --python /opt/venv/bin/python install --no-deps -c constraints.txt \
      --index-url https://download.pytorch.org/whl/cpu torch \
 && pip --python /opt/venv/bin/python install -c constraints.txt -r requirements.txt \
      "$(sed -n 's/^onnxruntime-gpu==/onnxruntime==/p' constraints.txt)"

# CUDA's libraries come with torch; the driver is the host's.
FROM depends AS depends-gpu
RUN pip --python /opt/venv/bin/python install -c constraints.txt -r requirements.txt onnxruntime-gpu

# Ourselves, and nothing else: what changes often is a small layer upon those that do not.
FROM build AS own
RUN pip install -c constraints.txt hatchling
COPY README.md LICENSE ./
COPY repository repository
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/dist . \
 && pip --python /opt/venv/bin/python install --no-deps --no-index /tmp/dist/*.whl

# Whatever runs.
FROM python:${PYTHON} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Model Depot" \
      org.opencontainers.image.description="A model repository server: drop model folders, they are served, hot-reloaded and measured." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# tini is process 1: it passes signals on, and buries what a model's own processes leave behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends "tini=0.19.*" \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 modeldepot \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /state \
      --shell /usr/sbin/nologin modeldepot \
 && install -d -o 10001 -g 10001 -m 0700 /state \
 && install -d /models
# Others reach the container's own address alone, so it listens there; without API keys it refuses to,
# unless MODELDEPOT_INSECURE=1 says that something in front keeps others away. `docker stop` kills
# after 10 s, and the server is to be done before.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MODELDEPOT_REPO=/models \
    MODELDEPOT_STATE_DIR=/state \
    MODELDEPOT_HOST=0.0.0.0 \
    MODELDEPOT_PORT=8000 \
    MODELDEPOT_GRPC_PORT=8001 \
    MODELDEPOT_GRACE=9
# Nothing else is written to: the root may be read-only.
VOLUME ["/state"]
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["modeldepot", "doctor", "--live"]
# In digits, so that Kubernetes can tell that it is not root.
USER 10001:10001
ENTRYPOINT ["tini", "--", "modeldepot"]
CMD ["serve"]

FROM runtime AS cpu
COPY --link --from=depends-cpu /opt/venv /opt/venv
COPY --link --from=own /opt/venv /opt/venv

FROM runtime AS gpu
# Read by NVIDIA's container runtime: which GPUs, and CUDA as well as NVML.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --link --from=depends-gpu /opt/venv /opt/venv
COPY --link --from=own /opt/venv /opt/venv

FROM ${DEVICE} AS image
