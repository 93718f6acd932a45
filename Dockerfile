# docker build -t session-sidecar . ; examples/docker/compose.yaml runs it, docs/operation.md says how.
# For replicas on PostgreSQL, as in examples/replicas: docker build --build-arg LOCK=requirements-postgres.lock .

FROM python:3.12-slim AS build
ARG LOCK=requirements.lock
WORKDIR /src
COPY $LOCK ./
RUN python -m venv /opt/session-sidecar \
    && /opt/session-sidecar/bin/pip install --no-cache-dir --require-hashes -r $LOCK
COPY pyproject.toml README.md LICENSE ./
COPY session_store session_store
COPY session_sidecar session_sidecar
RUN /opt/session-sidecar/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.12-slim
# tini: what an agent's tools leave behind becomes a child of process 1, which has to reap it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/session-sidecar sidecar \
    && install -d -m 700 -o sidecar -g sidecar /var/lib/session-sidecar
COPY --from=build /opt/session-sidecar /opt/session-sidecar
ENV PATH=/opt/session-sidecar/bin:$PATH \
    SIDECAR_HOME=/var/lib/session-sidecar
USER 10001:10001
WORKDIR /var/lib/session-sidecar
VOLUME /var/lib/session-sidecar
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client asks no proxy, whatever the environment says for the model.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import http.client, os, sys; \
sidecar = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('SIDECAR_PORT', '8000')), timeout=4); \
sidecar.request('GET', '/readyz'); \
sys.exit(sidecar.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "session-sidecar"]
CMD ["serve"]
