"""The conformance suite: one module per part of the pipeline, each claim a function ``check_<claim>(trial)``."""
