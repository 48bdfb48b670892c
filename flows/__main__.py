"""`python -m flows` is `pusa`."""

from flows.cli import main

raise SystemExit(main())
