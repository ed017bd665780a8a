"""The subjects: pipelines that the suite judges, this project's own and those of others."""
