"""Query-adaptive steering (FineSteer): gate, experts, intervention, profiles. Serves no HTTP and imports no server code."""
