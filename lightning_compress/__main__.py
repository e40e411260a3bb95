"""`python -m lightning_compress` is the command `lightning-compress`."""

from lightning_compress.cli import main

if __name__ == "__main__":
    main()
