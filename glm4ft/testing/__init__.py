"""The harness: strategies, checks and faults that prove a fine-tuning pipeline; nothing in ``glm4ft`` imports it."""
