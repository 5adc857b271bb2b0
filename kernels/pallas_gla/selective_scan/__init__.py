"""The selective scan of Mamba: a linear recurrence with a decay per channel and state (Gu & Dao 2023)."""

from pallas_gla.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
