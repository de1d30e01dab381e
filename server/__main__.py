"""`python -m server` is `finesteer`."""

from server.cli import main

if __name__ == "__main__":
    main()
