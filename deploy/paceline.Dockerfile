# The front server alone; models and chains are mounted. Built by deploy/compose.yaml.
FROM python:3.11-slim-bookworm
WORKDIR /paceline
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY server server
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
ENTRYPOINT ["paceline"]
