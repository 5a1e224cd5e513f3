# The project with its pinned packages, for training and sampling on NVIDIA GPUs (the driver is the host's), or on CPUs.
#
#   docker build --tag dit-family .
#   docker run --rm dit-family python train.py --dataset digits --model DiT-digits/2 --max-steps 100 --device cpu
#   mkdir -p results
#   docker run --rm --gpus all --ipc=host --volume "$PWD/data:/data" --volume "$PWD/results:/app/results" dit-family \
#       torchrun --nproc-per-node 8 train.py --data-path /data/imagenet/train --model DiT-XL/2
#
# --build-arg EXTRAS="video demo" installs extras, too. CUDA's libraries come with PyTorch's wheels. Its user has the
# number 1000; if yours has another (id -u), give `docker run` --user "$(id -u)", so that results/ can be written to.
FROM python:3.12-slim

# A compiler for torch.compile, which Triton needs on GPUs, too
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user && mkdir /app && chown user /app
USER user
WORKDIR /app

# The environment is a layer before the code: it is kept while only the code changes
ARG EXTRAS=""
COPY --chown=user locks ./locks
RUN python -m venv .venv && .venv/bin/pip install --no-cache-dir --require-hashes \
    $(for name in base $EXTRAS; do echo "--requirement locks/$name.lock"; done)
COPY --chown=user . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable .

ENV PATH="/app/.venv/bin:$PATH" PYTHONUNBUFFERED=1
CMD ["python", "train.py", "--help"]
