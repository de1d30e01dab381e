"""Who may ask what of the server, and how much. No torch, no FastAPI."""
