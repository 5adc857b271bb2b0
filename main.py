"""The program in a clone: `python main.py --help`. Installed, it is called `dig-jax`."""

from dig_jax.cli.main import main

if __name__ == "__main__":
    main()
