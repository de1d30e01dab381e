"""vLLM as the engine: its scheduler, cache and kernels, our gates, vectors and account of both. Read README.md here first."""
