"""`python -m moejax.cli`."""

from moejax import cli

if __name__ == "__main__":
    cli.main()
