"""`python -m gfnem`."""

from gfnem.app.main import main

# Processes that a launcher starts import this file, too.
if __name__ == "__main__":
    raise SystemExit(main())
