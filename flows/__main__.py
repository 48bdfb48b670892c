"""Make `python -m flows` the same as `pusa`."""

from flows.commands import main

if __name__ == "__main__":  # the spawned ranks of a fine-tune import this file
    raise SystemExit(main())
