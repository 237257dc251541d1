"""`python -m slicecli` is `slicecli`."""

from slicecli.cli import main

if __name__ == "__main__":
    main()
