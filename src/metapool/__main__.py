"""``python -m metapool`` is the console script ``metapool``."""

from metapool.interface.cli import main

if __name__ == "__main__":
    main()
