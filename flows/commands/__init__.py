"""The `pusa` command line: app.py lists the commands, each other file holds a group of them."""

from flows.commands.app import build_app, main

__all__ = ["build_app", "main"]
