# The index decides the CUDA version of torch; the driver of the host must support it. PyPI's torch
# 2.13.0 is built for CUDA 13.0.
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN python -m venv /opt/bitmill \
 && /opt/bitmill/bin/pip install --no-cache-dir --index-url ${TORCH_INDEX} -c constraints.txt torch numpy
COPY kernels kernels
COPY quant_core quant_core
COPY workers workers
COPY service service
RUN /opt/bitmill/bin/pip install --no-cache-dir -c constraints.txt ".[torch,worker,service,s3,postgres]"

FROM python:3.11-slim-bookworm
# Triton compiles its launcher with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home bitmill && install -d -o bitmill -g bitmill /data /cache
COPY --from=build /opt/bitmill /opt/bitmill
ENV PATH=/opt/bitmill/bin:$PATH PYTHONUNBUFFERED=1 BITMILL_DATA=/data TRITON_CACHE_DIR=/cache/triton \
    TORCH_EXTENSIONS_DIR=/cache/torch HF_HOME=/cache/huggingface PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
USER bitmill
VOLUME ["/data", "/cache"]
STOPSIGNAL SIGTERM
CMD ["python", "-m", "bitmill_workers.worker"]
