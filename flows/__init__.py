"""When, where and how often the stages of `pusa` run: Prefect flows, and the `pusa` command."""
