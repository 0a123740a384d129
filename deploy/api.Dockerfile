FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY quant_core quant_core
COPY workers workers
COPY service service
RUN python -m venv /opt/bitmill \
 && /opt/bitmill/bin/pip install --no-cache-dir -c constraints.txt ".[service,s3,postgres]"

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home bitmill && install -d -o bitmill -g bitmill /data
COPY --from=build /opt/bitmill /opt/bitmill
COPY deploy/logging.json /etc/bitmill/logging.json
ENV PATH=/opt/bitmill/bin:$PATH PYTHONUNBUFFERED=1 BITMILL_DATA=/data
USER bitmill
VOLUME /data
EXPOSE 8737
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8737/readyz', timeout=4)"]
CMD ["uvicorn", "--factory", "bitmill_service.main:create_app", "--host", "0.0.0.0", "--port", "8737", \
     "--http", "bitmill_service.http.connections:GuardedProtocol", "--backlog", "128", \
     "--proxy-headers", "--forwarded-allow-ips", "*", "--no-server-header", "--log-config", "/etc/bitmill/logging.json", "--timeout-graceful-shutdown", "20"]
