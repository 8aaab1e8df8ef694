# An image for clusters: the package and all that training needs, pinned by constraints.txt, run by a user without privileges.
#   docker build -t REGISTRY/cnn2gnn-dist:0.1.0 .
#   docker build -t REGISTRY/cnn2gnn-dist:0.1.0-cuda . --build-arg BASE=nvidia/cuda:VERSION-base-ubuntu24.04 \
#     --build-arg TORCH="torch==2.13.0 --index-url <the index of your CUDA version>"
# BASE: any image of Debian 12 or Ubuntu 24.04 (Python 3.11 or 3.12). torch's wheels bring CUDA's libraries with them.
ARG BASE=debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE}

# wget: the probes of cluster/kuberay ask with it. Versions of distribution packages are those of the base.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates libgomp1 python3 python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home cnn2gnn \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# torch goes first, by its pin, so that nothing later drags in another build of it (as in the Makefile).
ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# hadolint ignore=DL3013,SC2086
RUN python -m pip install --no-cache-dir --disable-pip-version-check ${TORCH}

# What is installed changes seldom, the package often: its dependencies are a layer of their own.
WORKDIR /opt/cnn2gnn-dist
COPY pyproject.toml constraints.txt README.md LICENSE ds_config.json ./
COPY cnn2gnn_dist/__init__.py cnn2gnn_dist/
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".[all]"
COPY cnn2gnn_dist cnn2gnn_dist
COPY launch launch
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall .

ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 10001
WORKDIR /home/cnn2gnn
ENTRYPOINT ["cnn2gnn"]
CMD ["doctor"]
