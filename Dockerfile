# amqtask's worker, beat, relay and console: docs/deploy.md. Your own image begins with this one, and adds your code:
#   FROM amqtask
#   COPY --chown=amqtask . /app
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG EXTRAS=redis,sqlalchemy,metrics,msgpack,zstd,otel,console
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY amqtask amqtask
COPY pools pools
RUN python -m venv --without-pip /opt/amqtask \
 && pip --python /opt/amqtask/bin/python install --no-cache-dir --no-compile ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
# A number, so that Kubernetes sees that it is not root.
RUN groupadd --gid 10001 amqtask \
 && useradd --uid 10001 --gid 10001 --home-dir /app --no-create-home --shell /usr/sbin/nologin amqtask \
 && install -d -o amqtask -g amqtask /app /var/lib/amqtask
COPY --from=build /opt/amqtask /opt/amqtask
ENV PATH=/opt/amqtask/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    AMQTASK_WORKER_HEALTH_PORT=8080 \
    AMQTASK_WORKER_METRICS_PORT=8080
WORKDIR /app
USER 10001:10001
EXPOSE 8080
# TERM lets running tasks end; `docker stop -t` should give them the time that they need.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=20s --timeout=5s --start-period=60s --start-interval=1s \
  CMD ["python", "-Sc", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/live'); r = c.getresponse(); print(r.read().decode()); raise SystemExit(r.status != 200)"]
# amqtask is PID 1: it takes TERM, INT and HUP, and reaps what its tasks leave behind.
ENTRYPOINT ["amqtask"]
CMD ["worker", "-l", "INFO"]
