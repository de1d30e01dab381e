# The server with the vLLM engine, on vLLM's own image for NVIDIA GPUs. From the repository's root:
#   docker build -f docker/vllm.Dockerfile -t finesteer:vllm .
#   docker run --rm --gpus all --ipc host -p 127.0.0.1:8000:8000 -e FINESTEER_API_KEY=… finesteer:vllm MODEL --host 0.0.0.0
FROM vllm/vllm-openai:v0.32.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY steering steering
COPY artifacts artifacts
# What the image has stays as vLLM needs it: only what is missing comes in.
RUN python3 -m pip list --format=freeze > /tmp/installed.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/installed.txt . \
    && mkdir /cache && chown 10001:10001 /cache && rm /tmp/installed.txt
ENV HOME=/tmp \
    HF_HOME=/cache \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=1200s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["finesteer", "serve", "--engine", "vllm"]
