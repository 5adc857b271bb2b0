"""`python -m dig_jax.convert`: see `dig_jax.convert.command`."""

from dig_jax.convert.command import main

if __name__ == "__main__":
    main()
