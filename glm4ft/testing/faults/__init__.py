"""Real bugs, one class each, put into the plain loop at the place where they occurred; they prove the checks."""
