# The front server alone; models and chains are mounted. Built by deploy/compose.yaml.
FROM python:3.11-slim-bookworm
WORKDIR /paceline
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY server server
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
COPY scripts/compile_server.py scripts/
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && python scripts/compile_server.py \
    && apt-get purge -y --auto-remove gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENTRYPOINT ["paceline"]
