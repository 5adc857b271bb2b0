"""`python -m dig_jax.convert`: see `dig_jax.convert.command`."""

import sys

from dig_jax.convert.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
