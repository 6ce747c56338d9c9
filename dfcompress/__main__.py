"""`python -m dfcompress`."""

from dfcompress.cli import main

if __name__ == "__main__":
    main()
