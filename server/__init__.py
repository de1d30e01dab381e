"""The OpenAI-compatible inference server around `steering`."""
