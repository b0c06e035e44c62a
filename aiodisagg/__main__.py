"""``python -m aiodisagg``."""

from aiodisagg.cli import main

if __name__ == "__main__":
    main()
