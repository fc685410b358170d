# One image for all parts; docker-compose.yml says which command each runs.
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements-run.lock pyproject.toml README.md LICENSE celeryconfig.py task_tags.py ./
COPY producers producers
COPY worker worker
RUN python -m venv /opt/task-tags \
 && /opt/task-tags/bin/pip install --no-cache-dir --require-hashes -r requirements-run.lock \
 && /opt/task-tags/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.13-slim
COPY --from=build /opt/task-tags /opt/task-tags
ENV PATH=/opt/task-tags/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --uid 10001 --no-create-home task-tags
USER 10001
WORKDIR /tmp
