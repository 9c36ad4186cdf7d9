# docker build -t bdam .                    CPU
# docker build -t bdam-cuda --target cuda . GPU, with the CUDA kernels of Mamba
# docker run --rm -it --shm-size=2g bdam make train       (GPU: --gpus all)
FROM python:3.11-slim-bookworm AS cpu
ARG TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libc6-dev libgomp1 make \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 --shell /bin/bash reader
WORKDIR /opt/bdam
RUN chown reader /opt/bdam
USER 10001
COPY --chown=reader . .
RUN make venv TORCH="$TORCH" LOCK=requirements/lock.txt && rm -rf ~/.cache/pip
ENV PATH="/opt/bdam/.venv/bin:$PATH"
CMD ["make", "help"]

# mamba-ssm has kernels for torch up to 2.10, so the lock file, which has 2.13, is not used here
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libgomp1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 --shell /bin/bash reader
WORKDIR /opt/bdam
RUN chown reader /opt/bdam
USER 10001
COPY --chown=reader . .
RUN make venv PYTHON=python3 TORCH="torch==2.10.0" && rm -rf ~/.cache/pip
ENV PATH="/opt/bdam/.venv/bin:$PATH"
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "ninja==1.13.0" "packaging==25.0" && pip install --no-cache-dir --no-build-isolation -e ".[cuda]"
CMD ["make", "help"]

# `docker build .` without a target ends here
FROM cpu
