"""`python -m dig_jax.convert`: see `dig_jax.convert.command`."""

import sys

from dig_jax.convert.command import main
from dig_jax.streams import ending_with_reader, prepare_streams

if __name__ == "__main__":
    prepare_streams()
    with ending_with_reader():
        sys.exit(main(sys.argv[1:]))
