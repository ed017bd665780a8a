"""Real bugs, one class each, put into the plain training loop where they occurred; they prove that the checks work."""
