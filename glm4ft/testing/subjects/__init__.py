"""Pipelines that are put on trial: this project's own, and others."""
