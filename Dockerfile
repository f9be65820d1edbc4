# syntax=docker/dockerfile:1
# Two stages: the first installs the locked dependencies and the wheel, the second is what runs.
#   CPU:   docker build -t peft-serve .
#   CUDA:  docker build -t peft-serve:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   run:   docker run -p 8000:8000 -v peft-serve-adapters:/data peft-serve
# What is locked has the packages of the extras [ray] and [s3] too: the same image is the one of a Ray cluster.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/peft-serve
COPY requirements.lock requirements.hashes ./
# torch comes from the index of the chosen device, at the version the lock pins.
RUN grep '^torch==' requirements.lock > torch.lock \
    && /opt/peft-serve/bin/pip install --no-deps --require-hashes -r requirements.hashes \
    && /opt/peft-serve/bin/pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple -r torch.lock \
    && /opt/peft-serve/bin/pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY server ./server
COPY adapters ./adapters
RUN /opt/peft-serve/bin/pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim
# The compiler is for the CPU kernels, which are built for the processor that runs them, at the first start; wget is what
# the KubeRay operator asks with whether a pod is ready.
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 peft && mkdir -p /data && chown peft:peft /data
COPY --from=build /opt/peft-serve /opt/peft-serve
ENV PATH=/opt/peft-serve/bin:$PATH PYTHONUNBUFFERED=1 \
    PEFT_SERVE_HOST=0.0.0.0 PEFT_SERVE_PORT=8000 PEFT_SERVE_STORE=/data/store HF_HOME=/data/hub
USER peft
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["peft-serve", "serve"]
CMD ["demo-llama"]
