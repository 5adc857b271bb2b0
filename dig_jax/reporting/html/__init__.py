"""WORKDIR/report.html: a run in one file that opens without a server or a network."""

from dig_jax.reporting.html.page import write_report
from dig_jax.training.telemetry.starts import note_start

__all__ = ["note_start", "write_report"]
