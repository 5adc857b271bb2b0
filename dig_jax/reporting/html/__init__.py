"""WORKDIR/report.html: a run in one file that opens without a server or a network."""

from dig_jax.reporting.html.page import write_report

__all__ = ["write_report"]
