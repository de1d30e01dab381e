"""Function tools: what a model is told of them, how it writes calls, and what is read from its text."""
