"""What the server does when clients, clocks, memory or its own code misbehave: faults, load, signals, and a long soak."""
