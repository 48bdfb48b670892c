"""Run the stages of `pusa`: Prefect flows, the trainer's processes, and the `pusa` command."""
